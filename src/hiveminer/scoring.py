"""`from hiveminer.scoring import Evidence`, for validators written before it moved."""

from hiveminer.validation.curves import Evidence

__all__ = ["Evidence"]
