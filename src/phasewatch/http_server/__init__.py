"""HTTP/1.1 on a socket for receiver and dashboard: strict request heads, and connections that cannot occupy a server."""
