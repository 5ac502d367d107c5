"""ldm_sg: self-guided latent diffusion models for images that nobody labelled.

The flow is the folder structure: data -> annotate -> store -> train -> sample -> evaluate.
"""

__version__ = "0.1.0"
