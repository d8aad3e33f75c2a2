"""HTTP/1.1 for receiver and dashboard: strict request heads, and limits on connections."""
