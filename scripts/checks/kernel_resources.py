"""Registers, shared memory and spills of every configuration of the Triton kernels, compiled for Hopper (sm_90); needs no GPU.

python scripts/checks/kernel_resources.py --out results/kernels_sm90_<yyyy-mm>       # some minutes on one core
python scripts/checks/kernel_resources.py --out ... --render                          # only table.md

The networks are 17-64-64-6 (HalfCheetah) and 348-256-256-17 (Humanoid). Arguments are specialized as at run time: pointers are
aligned, sizes that are multiples of 16 are known as such, and each member has one row. A thread of Hopper has at most 255
registers, and a block at most 227 KiB (232,448 bytes) of shared memory; spilled registers go to memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from es_flipout.errors import UserError
from scripts import report

MOST_SHARED = 232_448
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
NETWORKS = {"HalfCheetah": (17, 64, 64, 6), "Humanoid": (348, 256, 256, 17)}
POINTERS = {
    "r": "*i32", "s": "*i32", "words": "*i32", "members": "*i64", "base_of_source": "*i64", "sigma_at": "*fp64",
    "scale_at": "*fp64", "bias": "*fp32", "bias_noise": "*fp32", "bias_rows": "*fp32", "v": "*fp32", "sums": "*fp32",
    "plus": "*fp32", "biases": "*fp32", "bias_noises": "*fp32", "rs": "*i32", "ss": "*i32",
}  # fmt: skip
NUMBERS = (
    "x",
    "weight",
    "base",
    "y",
    "kept",
    "out",
    "own",
    "left",
    "right",
    "weights",
    "bases",
)  # of the precision's type


@dataclass(frozen=True)
class Case(report.Job):
    """One kernel for one size, in one configuration."""

    kernel: str
    sizes: str
    precision: str
    blocks: str
    warps: int
    stages: int
    function: Any
    constants: dict[str, Any]
    values: dict[str, int]
    layers: int

    KEY = ("kernel", "sizes", "precision", "blocks", "warps", "stages")


def main() -> None:
    """Compile what ``runs.csv`` does not hold yet, and write the table."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--kernels", nargs="+", help="only these kernels, such as mlp")
    options = report.parse(parser)
    if not options.render:
        import triton

        report.begin(options.out, {"target": "sm_90", "triton": triton.__version__, "kernels": options.kernels})
        chosen = [case for case in cases() if options.kernels is None or case.kernel in options.kernels]
        report.run_missing(chosen, compiled, options.out)
    report.write_table(options.out, table(report.read_csv(options.out / "runs.csv")))


def cases() -> Iterator[Case]:
    """All configurations that the engine may choose."""
    from es_flipout.kernels import linear, low_rank, mlp, signs, weighted_sum
    from es_flipout.kernels.tiles import block, config

    def case(
        kernel: str, sizes: str, precision: str, own: Any, function: Any, values: Any, layers: int = 0, **more: Any
    ) -> Case:
        blocks = " ".join(f"{name.removeprefix('BLOCK_').lower()}{value}" for name, value in own.kwargs.items())
        constants = {**own.kwargs, **more}
        return Case(
            kernel, sizes, precision, blocks, own.num_warps, own.num_stages, function, constants, values, layers
        )

    layers = sorted({pair for sizes in NETWORKS.values() for pair in pairwise(sizes)})
    for sizes in NETWORKS.values():
        shown = "-".join(map(str, sizes))
        for precision in PRECISIONS:
            widest = max(16, *sizes[1:-1])
            in_registers = precision != "ieee" and widest <= mlp._WIDEST_IN_REGISTERS
            more: dict[str, Any] = {"kept": None} if in_registers else {}
            more |= {"SIZES": sizes, "WIDEST": widest, "ACTIVATIONS": "tanh tanh none", "LAYERS": 3, "PER_SOURCE": 2}
            for own in mlp._configs(max(sizes[1:]), precision, in_registers):
                yield case(
                    "mlp", shown, precision, own, mlp._mlp_kernel, {"per_member": 1}, 3, **more, PRECISION=precision
                )
    for size_in, size_out in layers:
        words = {"r_width": -(-size_out // 32), "s_width": -(-size_in // 32)}
        values = {"per_member": 1, "size_out": size_out, "size_in": size_in, **words}
        shown = f"{size_in}-{size_out}"
        for precision in PRECISIONS:
            more = {
                "SIZE_IN": size_in,
                "SIZE_OUT": size_out,
                "BASES": 1,
                "PER_SOURCE": 2,
                "ACTIVATION": "tanh",
                "base_of_source": None,
                "bias_rows": None,
            }
            for own in linear._configs(size_out, size_in, precision):
                yield case("linear", shown, precision, own, linear._linear_kernel, values, **more, PRECISION=precision)
        for own in weighted_sum._configs(size_out, size_in):
            yield case("weighted_sum", shown, "ieee", own, weighted_sum._weighted_sum_kernel, values)
        own = config(4, 3, BLOCK_IN=block(size_in, 2048), BLOCK_OUT=block(size_out, 2048))
        yield case("low_rank", shown, "ieee", own, low_rank._own_kernel, values, RANK=1, PER_SOURCE=2, bias_rows=None)
        own = config(4, 3, BLOCK=block(size_in, 1024))
        yield case(
            "signed",
            shown,
            "ieee",
            own,
            signs._signed_kernel,
            {"size": size_in},
            ANTITHETIC=False,
            PER_SOURCE=2,
            plus=None,
        )
    yield case("signs", "any", "ieee", config(4, 3, BLOCK=signs._BLOCKS), signs._words_kernel, {})


def compiled(case: Case) -> dict[str, report.Rows]:
    """Compile a case, and assemble it to see what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, numbers = case.function, "*bf16" if case.precision == "bf16" else "*fp32"
    constants = dict(case.constants)
    constants |= {name: 1 for name, value in case.values.items() if value == 1 and name in function.arg_names}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    aligned = [["tt.divisibility", 16]]
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS or name in NUMBERS:
            kind = numbers if name in NUMBERS else POINTERS[name]
            if name in ("base", "bases") and case.precision != "tf32":
                kind = "*bf16"  # the signs of a base, see noise_product
            if case.kernel == "signs" and name == "out":
                kind = "*i32"
            many = case.layers > 0 and name in ("weights", "bases", "rs", "ss", "biases", "bias_noises")
            signature[name] = (kind,) * case.layers if many else kind
            for at in [(place, layer) for layer in range(case.layers)] if many else [(place,)]:
                attributes[at] = aligned
        else:
            signature[name] = "fp32" if name in ("sigma", "scale") else "i32"
            if case.values.get(name, 1) % 16 == 0:
                attributes[(place,)] = aligned
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs=attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:  # a configuration that the compiler rejects belongs into the table
        said = " ".join(f"{type(error).__name__}: {error}".split())[:120].replace(",", ";")
        return {
            "runs": [
                {
                    **case.key,
                    "registers": "",
                    "shared": "",
                    "spill_stores": "",
                    "spill_loads": "",
                    "hgmma": "",
                    "error": said,
                }
            ]
        }
    used = assembled(made.asm["ptx"])
    row = {**case.key, **used, "shared": made.metadata.shared, "hgmma": "wgmma" in made.asm["ptx"], "error": ""}
    order = (*case.KEY, "registers", "shared", "spill_stores", "spill_loads", "hgmma", "error")
    return {"runs": [{name: row[name] for name in order}]}


def assembled(ptx: str) -> dict[str, int]:
    """What the assembler says about the registers of a kernel."""
    import triton.backends.nvidia

    assembler = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx, encoding="utf-8")
        command = [str(assembler), "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    said = done.stderr + done.stdout
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if done.returncode or registers is None or spilled is None:
        raise UserError(f"ptxas says: {' '.join(said.split())[:300]}")
    return {"registers": int(registers[1]), "spill_stores": int(spilled[1]), "spill_loads": int(spilled[2])}


def table(runs: report.Frame) -> str:
    """All configurations, in Markdown."""
    runs = runs.astype(object).fillna("")
    rows = []
    for _, run in runs.iterrows():
        what = [run["kernel"], run["sizes"], run["precision"], run["blocks"], run["warps"], run["stages"]]
        if run["error"]:
            rows.append([*what, run["error"], "", "", ""])
            continue
        shared = f"{int(run['shared']):,}" + (" (too much)" if int(run["shared"]) > MOST_SHARED else "")
        spills = f"{int(run['spill_stores']):,} / {int(run['spill_loads']):,}"
        rows.append([*what, int(run["registers"]), shared, spills, "yes" if run["hgmma"] in (True, "True") else ""])
    header = "kernel | sizes | precision | blocks | warps | stages | registers | shared | spilled | wgmma"
    return (
        "Triton kernels compiled for sm_90: registers per thread (at most 255), bytes of shared memory per block (at most "
        f"{MOST_SHARED:,}), bytes spilled per thread (stored / loaded), and whether products run on Hopper's tensor cores "
        "(wgmma).\n\n" + report.markdown(header, rows)
    )


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported
    report.run_script(main)
