"""Run -> images: seeds to latents to pixels, and the pictures that show them."""

from ldm_sg.sample.grid import contact_sheet, sample_grid, training_grid
from ldm_sg.sample.requests import Request, cluster_requests, histogram_requests, training_requests
from ldm_sg.sample.sampler import Sampler

__all__ = [
    "Request",
    "Sampler",
    "cluster_requests",
    "contact_sheet",
    "histogram_requests",
    "sample_grid",
    "training_grid",
    "training_requests",
]
