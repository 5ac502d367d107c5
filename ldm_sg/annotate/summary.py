"""What annotation says when it is done."""

from __future__ import annotations

from ldm_sg.annotate.columns import cluster_column, column_name, parse_kind
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
    kind = parse_kind(config)
    for name in [cluster_column(config, k) for k in config.clusters if kind.clustered]:
        report = store.manifest["columns"][name]["report"]
        sizes = report["sizes"]
        lines.append(
            f"column {name}: sizes {max(sizes)} to {min(sizes)}, inertia {report['inertia']:.4f}, {report['engine']}"
        )
        lines.append("  " + " ".join(map(str, sizes)))
        if "nmi" in report:
            lines.append(f"  NMI against the data set's own labels (never used otherwise): {report['nmi']:.3f}")
    if kind.name != "clusters":
        lines.append(_describe(store, column_name(config)))
    return "\n".join(lines)


def _describe(store: Store, name: str) -> str:
    record = store.manifest["columns"][name]
    provenance, report = record["provenance"], record["report"]
    line = f"column {name}: {provenance['algorithm']}, K={provenance['num_clusters']}"
    if record["kind"] == "mask":
        return f"{line}, {report['share']:.1%} of the cells in a mask, {report['empty']} images without"
    if record["kind"] == "shuffled":
        return f"{line}, {report['changed']:.1%} of the images in another cluster than before"
    return f"{line}, images per class {' '.join(map(str, report['images']))}"
