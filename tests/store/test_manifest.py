"""Generations: each is taken once, a lost race is run again, damage and newer formats are named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ldm_sg.store import commit, manifest


def _manifest(generation: int) -> manifest.Manifest:
    fields = {"job": "ab" * 32, "num_rows": 0, "shards": [], "schema": {}, "columns": {}, "assets": {}}
    return {"format": 1, "generation": generation, "created": manifest.now(), **fields}


def test_a_generation_is_taken_once(tmp_path: Path) -> None:
    assert manifest.latest_generation(tmp_path) == 0
    assert manifest.commit_manifest(tmp_path, _manifest(1)) == 1
    before = manifest.manifest_path(tmp_path, 1).read_bytes()
    with pytest.raises(FileExistsError):
        manifest.commit_manifest(tmp_path, _manifest(1))
    assert os.listdir(tmp_path) == ["manifest-000001.json"]
    assert manifest.manifest_path(tmp_path, 1).read_bytes() == before


def test_without_hard_links_a_generation_is_still_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    manifest.commit_manifest(tmp_path, _manifest(1))
    with pytest.raises(FileExistsError):
        manifest.commit_manifest(tmp_path, _manifest(1))
    assert os.listdir(tmp_path) == ["manifest-000001.json"]
    assert manifest.read_manifest(tmp_path)["generation"] == 1


def test_newest_that_was_collected_while_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = manifest.latest_generation
    manifest.commit_manifest(tmp_path, _manifest(7))

    def stale_once(folder: Path) -> int:
        monkeypatch.setattr(manifest, "latest_generation", listed)
        return 6

    monkeypatch.setattr(manifest, "latest_generation", stale_once)
    assert manifest.read_manifest(tmp_path)["generation"] == 7
    monkeypatch.setattr(manifest, "latest_generation", stale_once)
    assert commit(tmp_path, lambda previous: {**previous, "num_rows": 1}) == 8
    with pytest.raises(FileNotFoundError, match="has no generation 6: the newest is 8"):
        manifest.read_manifest(tmp_path, 6)


def test_generations_count_beyond_six_digits(tmp_path: Path) -> None:
    for generation in (999_999, 1_000_000):
        manifest.commit_manifest(tmp_path, _manifest(generation))
    assert manifest.read_manifest(tmp_path)["generation"] == 1_000_000


def test_commit_runs_again_when_another_was_first(tmp_path: Path) -> None:
    manifest.commit_manifest(tmp_path, _manifest(1))
    seen = []

    def update(previous: manifest.Manifest) -> manifest.Manifest:
        seen.append(previous["generation"])
        if len(seen) == 1:
            commit(tmp_path, lambda other: {**other, "assets": {"theirs": {}}})
        return {**previous, "assets": {**previous["assets"], "ours": {}}}

    assert commit(tmp_path, update) == 3
    assert seen == [1, 2]
    assert manifest.read_manifest(tmp_path)["assets"] == {"theirs": {}, "ours": {}}


def test_commit_that_changes_nothing_makes_no_generation(tmp_path: Path) -> None:
    manifest.commit_manifest(tmp_path, _manifest(1))
    assert commit(tmp_path, lambda previous: previous) == 1
    assert os.listdir(tmp_path) == ["manifest-000001.json"]


def test_newer_format_is_refused(tmp_path: Path) -> None:
    manifest.commit_manifest(tmp_path, {**_manifest(1), "format": 2})
    with pytest.raises(ValueError, match=r"newer ldm_sg \(format 2, this one reads 1\): upgrade"):
        manifest.read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", '{"format": 1, "gen', "[]", '{"name": "package.json"}', '{"format": 1}'])
def test_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest-000001.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest-000001\.json is (damaged|not the manifest)"):
        manifest.read_manifest(tmp_path)


def test_missing_generation_is_named(tmp_path: Path) -> None:
    manifest.commit_manifest(tmp_path, _manifest(1))
    with pytest.raises(FileNotFoundError, match="has no generation 7: the newest is 1"):
        manifest.read_manifest(tmp_path, 7)


def test_manifest_is_strict_json(tmp_path: Path) -> None:
    manifest.commit_manifest(tmp_path, {**_manifest(1), "provenance": {"inertia": np.float32(0.5)}})
    text = manifest.manifest_path(tmp_path, 1).read_text("ascii")
    assert json.loads(text)["provenance"] == {"inertia": 0.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest.commit_manifest(tmp_path, {**_manifest(2), "provenance": {"inertia": float("nan")}})
