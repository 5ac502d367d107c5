"""The diffusion's formulas: pure functions on tensors, never a network."""

from ldm_sg.diffusion.guidance import guided_network, within_interval
from ldm_sg.diffusion.objective import training_loss
from ldm_sg.diffusion.parameterisation import PARAMETERISATIONS, Parameterisation, denoiser
from ldm_sg.diffusion.samplers import SAMPLERS, ddim_invert
from ldm_sg.diffusion.schedule import Schedule, Trajectory, build_schedule

__all__ = [
    "PARAMETERISATIONS",
    "SAMPLERS",
    "Parameterisation",
    "Schedule",
    "Trajectory",
    "build_schedule",
    "ddim_invert",
    "denoiser",
    "guided_network",
    "training_loss",
    "within_interval",
]
