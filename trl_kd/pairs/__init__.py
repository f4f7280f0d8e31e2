"""Preference pairs of a teacher's and a student's responses: built, resumed, merged and loaded."""

from trl_kd.pairs.build import build_pairs
from trl_kd.pairs.dataset import load_pairs
from trl_kd.pairs.merge import merge_shards
from trl_kd.pairs.pairing import PairingSettings
from trl_kd.pairs.places import StoreError
from trl_kd.pairs.rows import pair_row


__all__ = [
    "PairingSettings",
    "StoreError",
    "build_pairs",
    "load_pairs",
    "merge_shards",
    "pair_row",
]
