"""The diffusion's formulas: pure functions on tensors, never a network."""

from ldm_sg.diffusion.guidance import Halves, bind_halves, guided_network, is_inside, mix_halves, within_interval
from ldm_sg.diffusion.linear import linear_steps, sample_linear
from ldm_sg.diffusion.objective import training_loss
from ldm_sg.diffusion.parameterisation import PARAMETERISATIONS, Parameterisation, denoiser
from ldm_sg.diffusion.samplers import SAMPLERS, ddim_invert
from ldm_sg.diffusion.schedule import Schedule, Trajectory, build_schedule

__all__ = [
    "PARAMETERISATIONS",
    "SAMPLERS",
    "Halves",
    "Parameterisation",
    "Schedule",
    "Trajectory",
    "bind_halves",
    "build_schedule",
    "ddim_invert",
    "denoiser",
    "guided_network",
    "is_inside",
    "linear_steps",
    "mix_halves",
    "sample_linear",
    "training_loss",
    "within_interval",
]
