"""TRL's trainers for masked diffusion models; `trl_dllm` loads them when they are asked for."""
