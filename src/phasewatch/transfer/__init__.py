"""Transfer: upload bundles over HTTP, receive them, and validate them on arrival."""
