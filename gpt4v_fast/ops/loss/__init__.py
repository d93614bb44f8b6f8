"""Softmax cross-entropy over a large vocabulary: of given logits, and fused with the projection."""

from __future__ import annotations

from gpt4v_fast.ops.loss.cross_entropy import cross_entropy
from gpt4v_fast.ops.loss.labels import check_labels
from gpt4v_fast.ops.loss.linear_cross_entropy import linear_cross_entropy
from gpt4v_fast.ops.loss.reference import LossStats

__all__ = ["LossStats", "check_labels", "cross_entropy", "linear_cross_entropy"]
