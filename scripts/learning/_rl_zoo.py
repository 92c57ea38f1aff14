"""Tuned settings of rl-baselines3-zoo for the MuJoCo tasks, which its users get without asking.

https://github.com/DLR-RM/rl-baselines3-zoo: hyperparams/ppo.yml at 208b6fd and hyperparams/ars.yml at c6c209e (the rows for
-v4), hyperparams/sac.yml at c94924e (the rows for -v3); there are none for -v5. What a row does not name has the default value of
stable-baselines3. The names are those of its constructors, but for ``policy``, ``n_envs`` and ``normalize``: keyword arguments of
``VecNormalize`` (with the algorithm's own discount, as the zoo's ``exp_manager.py`` has it), or None for no normalization.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

_BOTH: Settings = {"norm_obs": True, "norm_reward": True}
_OBSERVATIONS: Settings = {"norm_obs": True, "norm_reward": False}


def ppo(env_id: str) -> Settings:
    """Settings of PPO."""
    from torch import nn

    wide = {
        "log_std_init": -2,
        "ortho_init": False,
        "activation_fn": nn.ReLU,
        "net_arch": {"pi": [256, 256], "vf": [256, 256]},
    }
    tuned: dict[str, Settings] = {
        "HalfCheetah-v5": {
            "n_steps": 512,
            "batch_size": 64,
            "gamma": 0.98,
            "learning_rate": 2.0633e-05,
            "ent_coef": 0.000401762,
            "clip_range": 0.1,
            "n_epochs": 20,
            "gae_lambda": 0.92,
            "max_grad_norm": 0.8,
            "vf_coef": 0.58096,
            "policy_kwargs": wide,
        },
        "Hopper-v5": {
            "n_steps": 512,
            "batch_size": 32,
            "gamma": 0.999,
            "learning_rate": 9.80828e-05,
            "ent_coef": 0.00229519,
            "clip_range": 0.2,
            "n_epochs": 5,
            "gae_lambda": 0.99,
            "max_grad_norm": 0.7,
            "vf_coef": 0.835671,
            "policy_kwargs": wide,
        },
        "Walker2d-v5": {
            "n_steps": 512,
            "batch_size": 32,
            "gamma": 0.99,
            "learning_rate": 5.05041e-05,
            "ent_coef": 0.000585045,
            "clip_range": 0.1,
            "n_epochs": 20,
            "gae_lambda": 0.95,
            "max_grad_norm": 1.0,
            "vf_coef": 0.871923,
        },
        "Swimmer-v5": {
            "n_envs": 4,
            "n_steps": 1024,
            "batch_size": 256,
            "gamma": 0.9999,
            "learning_rate": 6e-4,
            "gae_lambda": 0.98,
        },
    }
    return {"policy": "MlpPolicy", "n_envs": 1, "normalize": _BOTH, **tuned[env_id]}


def sac(env_id: str) -> Settings:
    """Settings of SAC."""
    discount = {"gamma": 0.9999} if env_id == "Swimmer-v5" else {}
    return {"policy": "MlpPolicy", "n_envs": 1, "normalize": None, "learning_starts": 10_000, **discount}


def ars(env_id: str) -> Settings:
    """Settings of ARS (sb3-contrib)."""
    tuned: dict[str, Settings] = {
        "HalfCheetah-v5": {
            "learning_rate": 0.02,
            "delta_std": 0.03,
            "n_delta": 32,
            "n_top": 4,
            "alive_bonus_offset": 0,
        },
        "Hopper-v5": {"learning_rate": 0.01, "delta_std": 0.025, "n_delta": 8, "n_top": 4, "alive_bonus_offset": -1},
        "Walker2d-v5": {
            "learning_rate": 0.03,
            "delta_std": 0.025,
            "n_delta": 40,
            "n_top": 30,
            "alive_bonus_offset": -1,
        },
        "Swimmer-v5": {
            "learning_rate": 0.02,
            "delta_std": 0.01,
            "n_delta": 1,
            "n_top": 1,
            "alive_bonus_offset": 0,
            "normalize": None,
        },
    }
    return {"policy": "LinearPolicy", "n_envs": 1, "normalize": _OBSERVATIONS, **tuned[env_id]}


SETTINGS = {"ppo": ppo, "sac": sac, "ars": ars}
