"""The kernels compile for a Hopper GPU, even without one: the compiler may reject what the interpreter accepts."""

import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

_WARPS, _STAGES = 4, 2
_LINEAR = {
    "SIZE_IN": 348,
    "SIZE_OUT": 40,
    "BASES": 3,
    "PER_SOURCE": 2,
    "ACTIVATION": "gelu",
    "BLOCK_M": 64,
    "BLOCK_N": 64,
}
_MLP = {
    "SIZES": (17, 64, 64, 6),
    "WIDEST": 64,
    "ACTIVATIONS": "tanh elu none",
    "LAYERS": 3,
    "PER_SOURCE": 2,
    "BLOCK_M": 64,
    "BLOCK_N": 64,
}


def compile_all(precision: str) -> None:
    """Compile in a separate process, in which Triton is imported without TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from es_flipout.kernels import linear, low_rank, mlp, signs, weighted_sum

    numbers = "*bf16" if precision == "bf16" else "*fp32"
    pointers = {
        "x": numbers, "weight": numbers, "base": numbers, "y": numbers, "kept": numbers, "r": "*i32", "s": "*i32",
        "words": "*i32", "members": "*i64", "base_of_source": "*i64", "sigma_at": "*fp64", "scale_at": "*fp64",
        "sigma": "fp32", "scale": "fp32", "sums": "*fp32", "v": "*fp32", "out": numbers, "own": numbers, "left": numbers,
        "right": numbers, "bias": "*fp32", "bias_noise": "*fp32", "bias_rows": "*fp32", "plus": "*fp32",
        "weights": (numbers,) * 3, "bases": (numbers,) * 3, "rs": ("*i32",) * 3, "ss": ("*i32",) * 3,
        "biases": ("*fp32",) * 3, "bias_noises": ("*fp32",) * 3,
    }  # fmt: skip

    def build(kernel: Any, constants: dict[str, Any]) -> None:
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places)
        options = {"num_warps": _WARPS, "num_stages": _STAGES}
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]

    depth = {"PRECISION": precision, "BLOCK_K": 16 if precision == "ieee" else 32}
    build(linear._linear_kernel, {**_LINEAR, **depth})
    build(mlp._mlp_kernel, {**_MLP, **depth})
    if precision != "ieee":
        build(mlp._mlp_kernel, {**_MLP, **depth, "kept": None})
    else:
        build(weighted_sum._weighted_sum_kernel, {"BLOCK_OUT": 32, "BLOCK_IN": 32, "BLOCK_K": 32})
        build(low_rank._own_kernel, {"RANK": 1, "PER_SOURCE": 2, "BLOCK_IN": 64, "BLOCK_OUT": 64})
        build(signs._signed_kernel, {"ANTITHETIC": True, "PER_SOURCE": 2, "BLOCK": 64})
        pointers["out"] = "*i32"
        build(signs._words_kernel, {"BLOCK": 256})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32", "bf16"])
def test_kernels_compile_without_a_gpu(precision: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, __file__, precision], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    compile_all(sys.argv[1])
