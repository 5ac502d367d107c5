"""What annotation says when it is done."""

from __future__ import annotations

from ldm_sg.config import AnnotateConfig
from ldm_sg.store import Store


def summary(store: Store, config: AnnotateConfig) -> str:
    """Describe a store and its cluster columns.

    Args:
        store: annotated.
        config: says which columns were asked for.
    Returns:
        Lines for a terminal: rows, quarantine, and per column sizes, inertia and NMI where there are labels.
    """
    bad = store.manifest["quarantine"]
    about = store.manifest["provenance"]
    lines = [f"store {store.folder} generation {store.generation}: {store.num_rows} images, {about['autoencoder_id']}"]
    if bad["count"]:
        key, reason = bad["images"][0]
        lines.append(f"quarantined {bad['count']} images (listed in quarantine.tsv), the first: {key}: {reason}")
    for name in [config.column] if config.column else [f"k{k}" for k in config.clusters]:
        report = store.manifest["columns"][name]["report"]
        sizes = report["sizes"]
        lines.append(
            f"column {name}: sizes {max(sizes)} to {min(sizes)}, inertia {report['inertia']:.4f}, {report['engine']}"
        )
        lines.append("  " + " ".join(map(str, sizes)))
        if "nmi" in report:
            lines.append(f"  NMI against the data set's own labels (never used otherwise): {report['nmi']:.3f}")
    return "\n".join(lines)
