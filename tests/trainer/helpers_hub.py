"""A stand-in for the Hub on localhost: what huggingface_hub asks of it to create, fill and read a model repository."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = (".safetensors", ".bin")


class Hub:
    """A server with one user, `me`; `with Hub() as hub`. `repos` has each repository's files, by path."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home) -> dict[str, str]:
        """What makes a process take this server for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_of_a_test",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # its storage servers are others
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def parts(self) -> list[str]:
        return unquote(urlparse(self.path).path).strip("/").split("/")

    def do_POST(self):
        self.hub.tokens.add(self.headers.get("Authorization"))
        parts, body = self.parts(), self.body()
        if parts[:3] == ["api", "repos", "create"]:
            name = json.loads(body)["name"]
            self.hub.repos.setdefault(f"me/{name}", {})
            self.answer(200, {"url": f"{self.hub.url}/me/{name}", "name": f"me/{name}", "id": f"me/{name}"})
        elif parts[:2] == ["api", "validate-yaml"]:
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular"}
                for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": [{**f, "shouldIgnore": False} for f in files]})
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            repo = self.hub.repos["/".join(parts[2:4])]
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repo[value["path"]] = self.hub.objects[value["oid"]]
            url = f"{self.hub.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
            self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(404, {"error": f"POST {self.path}"})

    def do_PUT(self):
        content = self.body()
        name = self.parts()[-1]
        if hashlib.sha256(content).hexdigest() != name:
            self.answer(400, {"error": "another content than was announced"})
        else:
            self.hub.objects[name] = content
            self.answer(200)

    def do_GET(self):
        parts = self.parts()
        repo = self.hub.repos.get("/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2]))
        if repo is None:
            self.answer(404, {"error": "no repository"}, X_Error_Code="RepoNotFound")
        elif parts[:2] == ["api", "models"]:
            files = [{"rfilename": path} for path in repo]
            tree = [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in repo.items()]
            self.answer(
                200, tree if "tree" in parts else {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": files}
            )
        elif "/".join(parts[4:]) in repo:
            content = repo["/".join(parts[4:])]
            self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET
