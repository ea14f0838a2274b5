"""Black-box transfer: images attacked on one encoder, measured on others."""
