"""A server on localhost that speaks as much of Google Cloud Storage's JSON interface as gcsfs, TensorStore and
google-cloud-storage need: objects with generations in memory, conditional and resumable uploads, ranges, lists, copies."""

import base64
import contextlib
import datetime
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse

import google_crc32c

PAGE = 50  # names per page of a list, few so that pages are turned


class Store:
    """The objects, {(bucket, name): (bytes, metadata)}, and what was asked for.

    Attributes:
      url: of the server.
      objects: see above; only to be looked at.
      requests: "METHOD path" of every request so far.
      before_upload: called with the name before an object is stored; may raise to lose it, or wait.
      down: whether all requests are answered with 503.
    """

    def __init__(self, *buckets):
        self.buckets, self.objects, self.requests = set(buckets), {}, []
        self.before_upload, self.down = (lambda name: None), False
        self.uploads, self._numbers, self.lock = {}, itertools.count(1000), threading.RLock()
        self.url = ""

    def put(self, bucket, name, content, condition=None):
        """Store an object unless ``condition``, the generation that must be there (0: none), is not met."""
        self.before_upload(name)
        with self.lock:
            there = self.objects.get((bucket, name))
            generation = int(there[1]["generation"]) if there else 0
            if condition is not None and int(condition) != generation:
                raise Refused(412)
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            metadata = {
                "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(content)), "metageneration": "1",
                "id": f"{bucket}/{name}", "contentType": "application/octet-stream", "updated": now, "timeCreated": now,
                "generation": str(next(self._numbers)), "etag": str(next(self._numbers)),
                "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
                "crc32c": base64.b64encode(google_crc32c.Checksum(content).digest()).decode(),
            }  # fmt: skip
            self.objects[bucket, name] = content, metadata
            return metadata

    def upload(self, folder, bucket, prefix=""):
        """All files of a local folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(bucket, f"{prefix}{path.relative_to(folder).as_posix()}", path.read_bytes())

    def names(self, bucket, prefix=""):
        """Sorted names of the objects."""
        with self.lock:
            return sorted(name for b, name in self.objects if b == bucket and name.startswith(prefix))

    def text(self, bucket, name):
        """An object's content."""
        return self.objects[bucket, name][0].decode()


class Refused(Exception):
    """With the status."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer takes 40 ms
    store: Store

    def log_message(self, *args):
        pass

    def _answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # gcsfs asks two things at once, and hangs up on the second
            self.wfile.write(body)

    def _handle(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.store.requests.append(f"{self.command} {self.path}")
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/(.*))?)?", url.path)
        try:
            if self.store.down:
                raise Refused(503)
            if url.path == "/batch/storage/v1":
                return self._batch(body)
            if match is None:
                raise Refused(501 if self.command != "GET" else 404)
            bucket, name = match[2], urllib.parse.unquote(match[4] or "")
            if bucket not in self.store.buckets:
                raise Refused(404)
            if match[3] is None:
                self._answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"})
            elif match[1] == "/upload":
                self._upload(bucket, query, body)
            elif copied := re.fullmatch(r"/storage/v1/b/[^/]+/o/(.+)/(?:rewriteTo/b/([^/]+)|moveTo)/o/(.+)", url.path):
                source, target_bucket, target = (urllib.parse.unquote(part or "") for part in copied.groups())
                content, _ = self._object(bucket, source)
                made = self.store.put(target_bucket or bucket, target, content, query.get("ifGenerationMatch"))
                if target_bucket:
                    return self._answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": made})
                self._delete(bucket, source, {})
                self._answer(200, made)
            elif not name:
                self._answer(200, self._list(bucket, query))
            elif self.command == "DELETE":
                self._delete(bucket, name, query)
                self._answer(204)
            else:
                self._get(bucket, name, query)
        except Refused as refusal:
            status = refusal.args[0]
            self._answer(status, {"error": {"code": status, "message": f"Refused: {self.path}", "errors": []}})

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _object(self, bucket, name):
        with self.store.lock:
            if (bucket, name) not in self.store.objects:
                raise Refused(404)
            return self.store.objects[bucket, name]

    def _get(self, bucket, name, query):
        content, metadata = self._object(bucket, name)
        generation = metadata["generation"]
        if query.get("generation", generation) != generation:
            raise Refused(404)
        if query.get("ifGenerationNotMatch") == generation:
            return self._answer(304)
        if query.get("ifGenerationMatch", generation) != generation:
            raise Refused(412)
        if query.get("alt") != "media":
            return self._answer(200, metadata)
        headers = {
            "Content_Type": "application/octet-stream", "x_goog_generation": generation, "x_goog_metageneration": 1,
            "ETag": metadata["etag"], "x_goog_hash": f"crc32c={metadata['crc32c']}",
            "x_goog_stored_content_length": len(content),
        }  # fmt: skip
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted or not content:
            return self._answer(200, content, **headers)
        first, last = wanted.groups()
        start = int(first) if first else max(len(content) - int(last), 0)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            raise Refused(416)
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._answer(206, content[start:stop], **headers)

    def _delete(self, bucket, name, query):
        with self.store.lock:
            _, metadata = self._object(bucket, name)
            if query.get("ifGenerationMatch", metadata["generation"]) != metadata["generation"]:
                raise Refused(412)
            del self.store.objects[bucket, name]

    def _list(self, bucket, query):
        prefix, delimiter, after = query.get("prefix", ""), query.get("delimiter"), query.get("pageToken", "")
        items, prefixes, last = [], [], ""
        for name in self.store.names(bucket, prefix):
            rest = name[len(prefix) :]
            folder = prefix + rest.partition(delimiter)[0] + delimiter if delimiter and delimiter in rest else None
            key = folder or name
            if key <= after or name < query.get("startOffset", "") or name >= query.get("endOffset", "\U0010ffff"):
                continue
            if len(items) + len(prefixes) == min(int(query.get("maxResults", PAGE)), PAGE) and key not in prefixes:
                return {"kind": "storage#objects", "items": items, "prefixes": prefixes, "nextPageToken": last}
            last = key
            if folder is None:
                items.append(self._object(bucket, name)[1])
            elif folder not in prefixes:
                prefixes.append(folder)
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}

    def _upload(self, bucket, query, body):
        kind, condition = query.get("uploadType"), query.get("ifGenerationMatch")
        if "upload_id" in query:
            return self._upload_part(query["upload_id"], body)
        if kind == "media":
            return self._answer(200, self.store.put(bucket, query["name"], body, condition))
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            with self.store.lock:
                key = str(len(self.store.uploads))
                self.store.uploads[key] = bucket, name, condition, bytearray()
            place = f"{self.store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            return self._answer(200, b"", Location=place)
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        _, metadata, media = (part for part in body.split(b"--" + boundary)[:3])
        metadata, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (metadata, media))
        content = content[:-2] if content.endswith(b"\r\n") else content[:-1]
        return self._answer(200, self.store.put(bucket, json.loads(metadata)["name"], content, condition))

    def _upload_part(self, key, body):
        bucket, name, condition, content = self.store.uploads[key]
        spoken = re.fullmatch(
            r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range") or f"bytes 0-0/{len(body)}"
        )
        content[int(spoken[1] or len(content)) :] = body
        if spoken[2] != "*" and len(content) == int(spoken[2]):
            return self._answer(200, self.store.put(bucket, name, bytes(content), condition))
        return self._answer(308, b"", **({"Range": f"bytes=0-{len(content) - 1}"} if content else {}))

    def _batch(self, body):
        """Deletions alone."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
        parts = []
        for i, (method, bucket, name) in enumerate(
            re.findall(r"(\w+) /storage/v1/b/([^/]+)/o/(\S+) HTTP", body.decode())
        ):
            status = 204
            try:
                if method != "DELETE":
                    raise Refused(501)
                self._delete(bucket, urllib.parse.unquote(name.partition("?")[0]), {})
            except Refused as refusal:
                status = refusal.args[0]
            parts.append(
                f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{i + 1}>\r\n\r\n"
                f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(parts) + f"--{boundary}--\r\n"
        self._answer(200, text.encode(), Content_Type=f"multipart/mixed; boundary={boundary}")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # the client hung up
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve(*buckets):
    """A running :class:`Store`."""
    store = Store(*buckets)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


def environment(store):
    """Variables that lead all three clients there; Google's own settings for emulators and tests."""
    return {
        "STORAGE_EMULATOR_HOST": store.url,
        "TENSORSTORE_GCS_HTTP_URL": store.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore's
        "GOOGLE_CLOUD_PROJECT": "none",
        "NO_GCE_CHECK": "true",
        # Else gcsfs would ask over gRPC what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
