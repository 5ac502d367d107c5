"""The store: what annotation writes and training reads; its format is docs/store.md.

Read in this order: format, manifest, writer, lease, reader (files, remote, shards), verify, gc, export.
"""

from __future__ import annotations

from ldm_sg.store.format import hash_config
from ldm_sg.store.lease import LEASE_S, Leases
from ldm_sg.store.manifest import commit
from ldm_sg.store.reader import Store, newest_store
from ldm_sg.store.verify import verify
from ldm_sg.store.writer import StoreWriter, has_column, write_asset, write_column

__all__ = [
    "LEASE_S",
    "Leases",
    "Store",
    "StoreWriter",
    "commit",
    "has_column",
    "hash_config",
    "newest_store",
    "verify",
    "write_asset",
    "write_column",
]
