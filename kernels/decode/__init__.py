"""Step numbers and coordinate planes to dense weights; whether Triton serves a device is decided here, by a trial."""
