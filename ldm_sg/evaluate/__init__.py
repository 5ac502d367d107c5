"""Images -> numbers: guidance agreement, copy audit, kernel distance, and the page that shows them."""

from ldm_sg.evaluate.agreement import guidance_agreement, histogram_variation, reconstruction_ceiling, unguided_images
from ldm_sg.evaluate.copies import audit_copies
from ldm_sg.evaluate.evaluation import evaluate
from ldm_sg.evaluate.kernel_distance import kernel_distance
from ldm_sg.evaluate.report import write_report

__all__ = [
    "audit_copies",
    "evaluate",
    "guidance_agreement",
    "histogram_variation",
    "kernel_distance",
    "reconstruction_ceiling",
    "unguided_images",
    "write_report",
]
