"""Stores of bundles in a folder or a bucket: each bundle is written once, with a receipt."""
