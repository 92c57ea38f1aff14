#!/usr/bin/env bash
# Every command that made results/, in order, with its cost in minutes on two cores.
#
#   scripts/reproduce.sh             everything: about ten hours
#   scripts/reproduce.sh families    only results/families_$WHERE; NAMES are the first words of the lines below
#
# The folders are called results/NAME_$WHERE; the committed ones have WHERE=epyc-2core_2026-11, and the date keeps them as they
# are. What a folder already holds is not run again, except where times are measured: those scripts start over, and nothing else
# should run on the machine meanwhile. Costs are sums of the times in runs.csv divided by the runs side by side, or estimates.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
WHERE=${WHERE:-reproduced_$(date +%Y-%m)}
only=${1:-}
known=

run() { # NAME SCRIPT [OPTIONS]
    known+=" $1"
    if [[ -z $only || $only == "$1" ]]; then
        echo "== results/$1_$WHERE: $2 ${*:3}"
        "$PYTHON" "$2" --out "results/$1_$WHERE" "${@:3}"
    fi
}

trained=runs/trained_CartPole-v1
humanoid=runs/lengths_Humanoid-v5

run families scripts/learning/families.py # 126: train_s
run learning scripts/learning/presets.py --envs CartPole-v1 Acrobot-v1 MountainCar-v0 MountainCarContinuous-v0 InvertedPendulum-v5 \
    Reacher-v5 Pusher-v5 HalfCheetah-v5 # 35: train_s
run learning scripts/learning/presets.py --envs Pendulum-v1 InvertedDoublePendulum-v5 Swimmer-v5 Hopper-v5 --seeds {0..9} # 60: train_s
run learning scripts/learning/presets.py --envs Walker2d-v5 # 60: train_s
run learning scripts/learning/presets.py --envs LunarLander-v3 --env-steps 1000000 # 6: train_s
run learning scripts/learning/presets.py --envs Ant-v5 --seeds 0 1 2 --env-steps 1000000 # 5: train_s
run learning scripts/learning/presets.py --envs HumanoidStandup-v5 --seeds 0 1 2 --env-steps 500000 # 6: train_s
run learning scripts/learning/presets.py --envs Humanoid-v5 --seeds 0 1 2 --env-steps 1000000 # 15: train_s
run learning scripts/learning/presets.py --envs BipedalWalker-v3 --seeds 0 1 2 --env-steps 1500000 # 12: train_s
run methods scripts/learning/methods.py --envs HalfCheetah-v5 Swimmer-v5 --seeds 0 1 2 # 30: train_s
run memory scripts/learning/memory.py   # 8: train_s
run against_rl scripts/learning/against_rl.py --venv "${TMPDIR:-/tmp}/es_flipout_rl" # 285: wall_s, and evaluation; 1.5 GB to install

run exported scripts/learning/exported.py # 4: estimate

run paper_variance scripts/paper/variance.py                   # 15: estimate
run paper_bayes_by_backprop scripts/paper/bayes_by_backprop.py # 25: seconds
run paper_language_models scripts/paper/language_models.py     # 56: seconds, on a busy machine
run paper_es scripts/paper/es.py                               # 12: updates * seconds_per_update, and the draws

run speed scripts/speed/rollout_and_forward.py --env-ids HalfCheetah-v5 --populations 128 512 --rounds 3 --seconds 1.5 # 5: estimate
if [[ (-z $only || $only == compare) && ! -d $trained ]]; then
    "$PYTHON" -m es_flipout train CartPole-v1 --run-dir "$trained" # 1: estimate
fi
run compare scripts/speed/compare.py --env-ids HalfCheetah-v5 Hopper-v5 Walker2d-v5 Humanoid-v5 CartPole-v1 --episode-steps 100 \
    --rounds 3 --seconds 1.5 --price-core-hour 0.04 --run-dirs "$trained"                # 9: estimate
run paper_update_time scripts/paper/update_time.py --rounds 2 --batch 32                 # 5: seconds, and a warm-up
run peers scripts/speed/peers.py --venv "${TMPDIR:-/tmp}/es_flipout_peers" --env-ids HalfCheetah-v5 \
    --engines es_flipout es_flipout_classic_ray evotorch ars_linear --rounds 1 --seconds 5 # 4: seconds, and a warm-up; 1.5 GB to install
run cartpole scripts/speed/cartpole.py --venv "${TMPDIR:-/tmp}/es_flipout_evosax" # 12: measured
run sharding scripts/speed/sharding.py --env-ids HalfCheetah-v5 Hopper-v5 Walker2d-v5 CartPole-v1 --populations 512 --rounds 3 # 3: measured
run scaling scripts/speed/scaling.py --tasks HalfCheetah-v5                              # 3: estimate
if [[ (-z $only || $only == occupancy) && ! -d $humanoid ]]; then
    "$PYTHON" -m es_flipout train Humanoid-v5 --run-dir "$humanoid" --policy linear --population-size 96 --sigma .03 --learning-rate .03 \
        --no-remove-alive-bonus --score-every 20 --checkpoint-every 20 --keep-checkpoints 1000 --env-steps 1052000 # 10: estimate
fi
run occupancy scripts/speed/occupancy.py --run-dir "$humanoid" # 1: estimate
run reliability scripts/checks/reliability.py                                            # 210: minutes of the options, and an estimate
run language_model scripts/speed/language_model.py                                       # 4: seconds, on a busy machine
run kernels scripts/checks/kernel_resources.py # 10: estimate; compiles for sm_90, needs no GPU

if [[ -n $only && " $known " != *" $only "* ]]; then
    echo "there is no $only; choose from$known" >&2
    exit 2
fi
