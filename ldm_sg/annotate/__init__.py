"""Images -> store: features (g), clusters (f), and the pipeline that runs them."""

from ldm_sg.annotate.pipeline import annotate
from ldm_sg.annotate.summary import summary

__all__ = ["annotate", "summary"]
