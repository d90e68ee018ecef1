"""Methods to compare with: a small file each, the same records, the same probe."""
