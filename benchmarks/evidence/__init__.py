"""Does it help? Ablations and linear probes over folds of real tiles (EVIDENCE.md)."""
