"""A model hub on this machine: as much of its protocol as uploads and downloads of models use."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

USER = "someone"
WRITE, READ = "hf_standInWriteToken", "hf_standInReadToken"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: files by name, commits by message.

    refuse: a part of the paths that are answered with 400. large: endings of files that are
    uploaded as objects of their own.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}
        self.private = {}
        self.commits = []
        self.objects = {}
        self.requests = []
        self.refuse = None
        self.large = (".safetensors", ".png")
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def files(self, repo_id):
        return self.repositories[repo_id]

    def sha(self, repo_id):
        names = sorted((name, self.oid(name, data)) for name, data in self.files(repo_id).items())
        return hashlib.sha1(repr(names).encode()).hexdigest()

    def oid(self, name, data):
        """Of a file: as git has it, or of its content where it is large."""
        if name.endswith(self.large):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request; `ROUTES` says which method answers it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Say nothing."""

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def respond(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.chunks()
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path))
        if self.server.refuse and self.server.refuse in path:
            return self.answer({"error": "the disk of the stand-in is full"}, 400)
        for command, pattern, method in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and command == self.command:
                return method(self, *found.groups())
        return self.answer({"error": f"no such route: {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = respond

    def chunks(self):
        """The body of a request that does not say how long it is."""
        parts = []
        while "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            size = int(self.rfile.readline(), 16)
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            if size == 0:
                break
        return b"".join(parts)

    def json(self):
        return json.loads(self.body)

    def answer(self, values, status=200):
        self.send(json.dumps(values).encode(), status, {"Content-Type": "application/json"})

    def send(self, data, status=200, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self, owner):
        return self.token() == WRITE and owner == USER

    def whoami(self):
        role = {WRITE: "write", READ: "read"}.get(self.token())
        if role is None:
            return self.answer({"error": "Invalid credentials"}, 401)
        return self.answer({"name": USER, "auth": {"accessToken": {"role": role}}})

    def create(self):
        asked, server = self.json(), self.server
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        if not self.may_write(repo_id.partition("/")[0]):
            return self.answer({"error": "You don't have the rights to do that"}, 403)
        url = {"url": f"{server.url}/{repo_id}"}
        if repo_id in server.repositories:
            return self.answer(url | {"error": "You already created this model repo"}, 409)
        server.repositories[repo_id] = {}
        server.private[repo_id] = asked.get("visibility") == "private" or asked.get("private")
        return self.answer(url)

    def validate(self):
        content = self.json()["content"]
        values = yaml.safe_load(content.split("---\n")[1])
        wrong = [] if isinstance(values, dict) else [{"message": "no mapping"}]
        return self.answer({"warnings": [], "errors": wrong}, 400 if wrong else 200)

    def preupload(self, repo_id):
        present = self.server.files(repo_id)
        names = [file["path"] for file in self.json()["files"]]
        modes = [
            {
                "path": name,
                "uploadMode": "lfs" if name.endswith(self.server.large) else "regular",
                "shouldIgnore": False,
                "oid": self.server.oid(name, present[name]) if name in present else None,
            }
            for name in names
        ]
        return self.answer({"files": modes})

    def batch(self):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.url}/objects/{one['oid']}"}}}
            for one in self.json()["objects"]
        ]
        return self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        return self.send(b"")

    def commit(self, repo_id):
        if not self.may_write(repo_id.partition("/")[0]):
            return self.answer({"error": "Forbidden"}, 403)
        files, changed = self.server.files(repo_id), []
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                continue
            changed.append(value["path"])
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                files[value["path"]] = self.server.objects[value["oid"]]
        self.server.commits.append((message, sorted(changed)))
        sha = self.server.sha(repo_id)
        return self.answer(
            {"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        )

    def info(self, repo_id):
        if repo_id not in self.server.repositories:
            return self.answer({"error": "Repository not found"}, 404)
        files = [{"rfilename": name} for name in self.server.files(repo_id)]
        values = {"_id": "1", "id": repo_id, "modelId": repo_id, "siblings": files, "tags": []}
        return self.answer(values | {"sha": self.server.sha(repo_id), "private": False})

    def tree(self, repo_id):
        files = self.server.files(repo_id).items()
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": self.server.oid(name, data)}
            for name, data in files
        ]
        return self.answer(entries)

    def download(self, repo_id, name):
        data = self.server.files(repo_id).get(name)
        if data is None:
            return self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{self.server.oid(name, data)}"',
            "X-Repo-Commit": self.server.sha(repo_id),
        }
        return self.send(data, 200, headers)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/preupload/main", Handler.preupload),
    ("POST", r"/[\w./-]+\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/objects/(\w+)", Handler.store),
    ("POST", f"/api/models/{NAME}/commit/main", Handler.commit),
    ("GET", rf"/api/models/{NAME}(?:/revision/\w+)?", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/\w+", Handler.tree),
    ("HEAD", rf"/{NAME}/resolve/\w+/(.+)", Handler.download),
    ("GET", rf"/{NAME}/resolve/\w+/(.+)", Handler.download),
]
