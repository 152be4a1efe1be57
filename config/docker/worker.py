"""A worker that knows nothing of etcd: every path answers with the name of the machine.

`pingora-etcd register` runs it, registers it, and takes it out before it sends SIGTERM, so it needs no end of
its own.
"""

import http.server
import socket
import sys


class Worker(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections
    disable_nagle_algorithm = True

    def do_GET(self):
        body = f"{self.path} by {socket.gethostname()}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass  # the balancers can log requests


http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Worker).serve_forever()
