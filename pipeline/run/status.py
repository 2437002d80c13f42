"""The status with which a model's part of a run ends."""

from typing import Literal

Status = Literal["published", "up to date", "failed"]
