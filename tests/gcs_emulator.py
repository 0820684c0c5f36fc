"""Starts gcp-storage-emulator: ``python gcs_emulator.py PORT``.

The emulator ignores preconditions on an object's generation, by which TensorStore notices that
another process has written: they are checked here. Each connection gets a thread.
"""

import re
import sys
import threading
from http import HTTPStatus, server
from urllib.parse import parse_qs, unquote, urlparse

server.HTTPServer = server.ThreadingHTTPServer

from gcp_storage_emulator import server as emulator  # noqa: E402
from gcp_storage_emulator.exceptions import NotFound  # noqa: E402

LOCK = threading.Lock()
UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")
OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")


def generation_of(handler) -> str | None:
    """The generation of the object that a request names, "0" where there is none."""
    url = urlparse(handler.path)
    if found := OBJECT.fullmatch(url.path):
        bucket, name = found[1], unquote(found[2])
    elif (found := UPLOAD.fullmatch(url.path)) and "name" in parse_qs(url.query):
        bucket, name = found[1], parse_qs(url.query)["name"][0]
    else:
        return None
    try:
        return handler.storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


class Router(emulator.Router):
    def handle(self, method: str) -> None:
        handler = self._request_handler
        query = parse_qs(urlparse(handler.path).query)
        with LOCK:
            handler.generation = generation = generation_of(handler)
            if generation is not None:
                if query.get("ifGenerationMatch", [generation]) != [generation]:
                    return self.refuse(HTTPStatus.PRECONDITION_FAILED)
                if query.get("ifGenerationNotMatch") == [generation]:
                    return self.refuse(HTTPStatus.NOT_MODIFIED)
            super().handle(method)

    def refuse(self, status: HTTPStatus) -> None:
        self._request_handler.rfile.read(
            int(self._request_handler.headers.get("Content-Length") or 0)
        )
        response = emulator.Response(self._request_handler)
        response.status = status
        response.close()


class Response(emulator.Response):
    def close(self) -> None:
        generation = getattr(self._handler, "generation", None)
        if generation and self._handler.command == "GET":
            self["X-Goog-Generation"] = generation
        super().close()


emulator.Router, emulator.Response = Router, Response

if __name__ == "__main__":
    emulator.create_server(
        "127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket"
    ).run()
