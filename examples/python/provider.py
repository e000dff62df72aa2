#!/usr/bin/env python3
"""Provides the acomm task "echo", whose result is its arguments: provider.py SOCKET"""
import json, os, signal, socket, socketserver, struct, sys


def read_message(stream):
    header = stream.read(4)  # the length, big-endian; JSON follows
    size = struct.unpack(">I", header)[0] if len(header) == 4 else 0
    data = stream.read(size) if size <= 64 << 20 else b""
    if len(data) < size:
        raise ValueError("cut off, or over 64 MiB")
    return json.loads(data)


def write_message(sock, **message):
    data = json.dumps(message, allow_nan=False).encode()
    sock.sendall(struct.pack(">I", len(data)) + data)  # in one write


def refusal(request):  # why the request is not taken; "" if it is
    values = [request.get(name) for name in ("id", "task", "responsehook")]
    if any(not isinstance(v, (kind, type(None))) for v, kind in zip(values, (str, str, dict))):
        raise TypeError("a member of the wrong type")
    if not all(values) or request["task"] != "echo":
        return "no id, no hook, or a task other than echo"
    scheme, host, opaque, path = (values[2].get(name) or "" for name in ("Scheme", "Host", "Opaque", "Path"))
    return "" if scheme == "unix" and not host + opaque and path[:1] == "/" else "not a hook of this machine"


class Exchange(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            request = read_message(self.rfile)
            refused = refusal(request)
        except (ValueError, TypeError, AttributeError, RecursionError):
            return  # broken: the connection is closed
        write_message(self.request, error=refused)  # the acknowledgement, before the work
        if not refused:
            with socket.socket(socket.AF_UNIX) as hook, hook.makefile("rb") as acknowledgement:
                hook.connect(request["responsehook"]["Path"])
                write_message(hook, error="", id=request["id"], result=request.get("args"))
                read_message(acknowledgement)


signal.signal(signal.SIGTERM, lambda *_: sys.exit())
socketserver.ThreadingUnixStreamServer.request_queue_size = 128
with socketserver.ThreadingUnixStreamServer(sys.argv[1], Exchange) as server:
    try:
        print("listening on unix://" + os.path.abspath(sys.argv[1]), flush=True)
        server.serve_forever()
    finally:
        os.unlink(sys.argv[1])
