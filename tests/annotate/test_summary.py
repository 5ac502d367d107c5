"""What annotation says at its end."""

from __future__ import annotations

from pathlib import Path

from ldm_sg.annotate import annotate, summary
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import FolderSource
from ldm_sg.store import Store


def test_sizes_and_inertia(tiny_store: Store) -> None:
    text = summary(tiny_store, AnnotateConfig(clusters=[3]))
    report = tiny_store.manifest["columns"]["k3"]["report"]
    assert "24 images" in text and str(tiny_store.folder) in text and "patch-pca-16x16" in text
    assert f"inertia {report['inertia']:.4f}" in text
    assert " ".join(map(str, report["sizes"])) in text
    assert "quarantined" not in text and "NMI" not in text


def test_quarantine_labels_and_several_columns(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "broken.png").write_bytes(b"x")
    labels = {key: len(key) % 2 for key in FolderSource(image_folder).keys}
    config = AnnotateConfig(dataset=str(image_folder), size_px=64, clusters=[2, 4])
    store = annotate(config, FolderSource(image_folder, labels=labels), tmp_path / "store")
    text = summary(store, config)
    assert "quarantined 1 images" in text and "broken.png" in text
    assert "column k2" in text and "column k4" in text
    for name in ("k2", "k4"):
        assert f"{store.manifest['columns'][name]['report']['nmi']:.3f}" in text
