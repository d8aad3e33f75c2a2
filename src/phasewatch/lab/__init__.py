"""Recording real episodes: QEMU machines, their sources, the sink they talk to, plans, and the recorder."""
