"""The server: pages, an HTTP and WebSocket API. It reads a runs folder and writes requests; no run depends on it."""
