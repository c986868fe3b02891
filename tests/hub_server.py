"""The routes of the Hugging Face Hub that its client uses for models, over HTTP on loopback, held in memory.

Written after what huggingface_hub sends and the Git LFS batch API: repositories with branches, tags and commits, git
blobs for small text, LFS objects by sha256 for the rest, private repositories, and faults that tests switch on.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS = {"token-alice": "alice", "token-bob": "bob"}
TOKENS |= dict.fromkeys(("token-reader", "token-fine", "token-few"), "alice")
# a fine-grained token's permissions, by what it may do them to
SCOPES = {
    "token-fine": [dict(entity=dict(type="user", name="alice"), permissions=["repo.content.read", "repo.write"])],
    "token-few": [dict(entity=dict(type="user", name="alice"), permissions=["repo.content.read"])],
}
ORGS = {"alice": {"aviary": "write", "museum": "read"}}
READERS = ("token-reader", "token-few")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Blob:
    """A file of a commit: its bytes, and its name in git or LFS."""

    def __init__(self, content: bytes, lfs: bool) -> None:
        self.content, self.lfs = content, lfs
        framed = b"blob %d\0%s" % (len(content), content)
        self.etag = hashlib.sha256(content).hexdigest() if lfs else hashlib.sha1(framed).hexdigest()


class Repository:
    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, Blob]] = {}
        self.refs: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        before = self.commits[self.refs[branch]] if branch in self.refs else {}
        named = json.dumps([len(self.commits), branch, {name: blob.etag for name, blob in files.items()}])
        commit = hashlib.sha1(named.encode()).hexdigest()
        self.commits[commit] = before | files
        self.refs[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """A server in a thread; `url` is its HF_ENDPOINT.

    Faults are attributes: a number of bytes after which connections break, or a switch. `None` and `False` are none.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.requests: list[str] = []
        self.resumed: list[int] = []  # offsets that downloads went on from
        self.unknown: list[str] = []
        self.clear_faults()
        handler = type("BoundHandler", (Handler,), dict(hub=self))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def clear_faults(self) -> None:
        self.cut_upload: int | None = None  # of an LFS upload's body
        self.cut_uploads_left = 0
        self.spoil_upload = False  # a byte of an LFS upload changes on its way
        self.cut_download: int | None = None  # of each answer with weights
        self.truncate_download: int | None = None  # the answer is whole but short
        self.truncate_storage: int | None = None  # so is what the server says of its size
        self.spoil_download: str | None = None  # a byte of this file changes on its way
        self.refuse_commits = False
        self.move_main: str | None = None  # the commit that main moves to once a config.json is sent

    @contextmanager
    def faults(self, **faults: Any) -> Iterator[None]:
        for name, value in faults.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        try:
            yield
        finally:
            self.clear_faults()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo]
        commit = repository.resolve(revision)
        assert commit is not None
        return {name: blob.content for name, blob in repository.commits[commit].items()}

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    # answers

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if body is not None:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = dict(X_Error_Message=message, **(dict(X_Error_Code=code) if code else {}))
        self.answer(status, dict(error=message), **headers)

    def break_off(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    # requests

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.token)

    def may_write(self, owner: str) -> bool:
        member = self.user == owner or ORGS.get(self.user or "", {}).get(owner) == "write"
        return member and self.token not in READERS

    def readable(self, name: str) -> Repository | None:
        """The repository, or None after an answer that does not tell a private one from none."""
        repository = self.hub.repositories.get(name)
        if repository is not None and (not repository.private or self.user == name.split("/")[0]):
            return repository
        if self.user is None:  # the client tells it from other refusals by the address, if that is https, or the code
            self.refuse(401, "Invalid username or password.", "RepoNotFound")
        else:
            self.refuse(404, "Repository not found", "RepoNotFound")
        return None

    def writable(self, name: str) -> Repository | None:
        repository = self.readable(name)
        if repository is not None and not self.may_write(name.split("/")[0]):
            self.body()
            self.refuse(403, f"Forbidden: no write access to {name}.")
            return None
        return repository

    def handle_route(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if route_method == method and match:
                action(self, **{name: unquote(value) for name, value in match.groupdict().items()})
                return
        self.hub.unknown.append(f"{self.command} {self.path}")
        self.body()
        self.refuse(404, "No such route")

    do_GET = do_HEAD = do_POST = do_PUT = handle_route

    # routes

    def whoami(self) -> None:
        if self.user is None:
            return self.refuse(401, "Invalid username or password.")
        access: dict[str, Any] = dict(displayName="test", role="read" if self.token in READERS else "write")
        if self.token in SCOPES:
            access.update(role="fineGrained", fineGrained=dict(canReadGatedRepos=True, scoped=SCOPES[self.token]))
        orgs = [dict(type="org", name=name, roleInOrg=role) for name, role in ORGS.get(self.user, {}).items()]
        auth = dict(type="access_token", accessToken=access)
        return self.answer(200, dict(type="user", name=self.user, orgs=orgs, auth=auth))

    def create(self) -> None:
        request = json.loads(self.body())
        if self.user is None:
            return self.refuse(401, "Invalid username or password.")
        owner = request.get("organization") or self.user
        if not self.may_write(owner):
            return self.refuse(403, f"You don't have the rights to create a model under the namespace {owner}.")
        name = f"{owner}/{request['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            return self.answer(409, dict(error="You already created this model repo", url=url))
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.repositories[name] = Repository(private)
        return self.answer(200, dict(url=url, name=name))

    def find(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        """A repository that this client may read and its commit; None once it has been refused."""
        repository = self.readable(repo)
        commit = repository.resolve(revision) if repository else None
        if repository and commit is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return (repository, commit) if repository and commit else None

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.find(repo, revision)
        if found is None:
            return None
        repository, commit = found
        siblings = [dict(rfilename=name) for name in repository.commits[commit]]
        answer = dict(id=repo, modelId=repo, sha=commit, private=repository.private, siblings=siblings, tags=[])
        return self.answer(200, answer)

    def branch(self, repo: str, branch: str) -> None:
        repository = self.writable(repo)
        if repository is None:
            return None
        request = json.loads(self.body() or b"{}")
        if branch in repository.refs:
            return self.refuse(409, "Reference already exists")
        start = repository.resolve(request.get("startingPoint", "main"))
        assert start is not None
        repository.refs[branch] = start
        return self.answer(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        repository = self.writable(repo)
        if repository is None:
            return None
        request = json.loads(self.body())
        commit = repository.resolve(revision)
        if commit is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = []
        for file in request["files"]:
            known = repository.commits[commit].get(file["path"])
            lfs = b"\0" in base64.b64decode(file["sample"]) or file["path"].endswith(".safetensors")
            oid = known.etag if known else None
            files.append(dict(path=file["path"], uploadMode="lfs" if lfs else "regular", shouldIgnore=False, oid=oid))
        return self.answer(200, dict(files=files))

    def batch(self, repo: str) -> None:
        if self.writable(repo) is None:
            return None
        request = json.loads(self.body())
        objects = []
        for each in request["objects"]:
            answer: dict[str, Any] = dict(oid=each["oid"], size=each["size"])
            if each["oid"] not in self.hub.objects:
                upload = dict(href=f"{self.hub.url}/lfs/{each['oid']}")
                answer["actions"] = dict(upload=upload, verify=dict(href=f"{self.hub.url}/{repo}.git/lfs/verify"))
            objects.append(answer)
        return self.answer(200, dict(transfer="basic", objects=objects))

    def upload(self, oid: str) -> None:
        if self.hub.cut_upload is not None and self.hub.cut_uploads_left:
            self.hub.cut_uploads_left -= 1
            self.rfile.read(self.hub.cut_upload)
            return self.break_off()
        content = bytearray(self.body())
        if self.hub.spoil_upload:
            content[len(content) // 2] ^= 1
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, "The content does not have the stated sha256")
        self.hub.objects[oid] = bytes(content)
        return self.answer(200)

    def verify(self, repo: str) -> None:
        if self.writable(repo) is None:
            return None
        request = json.loads(self.body())
        stored = self.hub.objects.get(request["oid"])
        if stored is None or len(stored) != request["size"]:
            return self.refuse(404, "The object is not there")
        return self.answer(200, {})

    def validate(self) -> None:
        request = json.loads(self.body())
        lacking = [] if request["content"].startswith("---\n") else [dict(message="The card has no metadata")]
        self.answer(400 if lacking else 200, dict(errors=lacking, warnings=[]))

    def commit(self, repo: str, revision: str) -> None:
        repository = self.writable(repo)
        if repository is None:
            return None
        lines = [json.loads(line) for line in self.body().splitlines()]
        if self.hub.refuse_commits:
            return self.refuse(500, "Internal error")
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
            else:
                return self.refuse(400, f"Can't commit {line['key']} {value['path']}")
        commit = repository.commit(revision, files)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        return self.answer(200, dict(success=True, commitOid=commit, commitUrl=url, hookOutput=""))

    def resolve(self, repo: str, revision: str, file: str) -> None:
        found = self.find(repo, revision)
        if found is None:
            return None
        repository, commit = found
        blob = repository.commits[commit].get(file)
        if blob is None:
            message = "Entry not found"
            headers = dict(X_Error_Message=message, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.answer(404, dict(error=message), **headers)
        self.send(blob, file, commit)
        if self.hub.move_main is not None and self.command == "GET" and file == "config.json":
            repository.refs["main"] = self.hub.move_main
        return None

    def send(self, blob: Blob, file: str, commit: str) -> None:
        hub, content = self.hub, bytearray(blob.content)
        if hub.spoil_download == file:
            # after safetensors' header: the file stays readable
            content[-1 if blob.lfs else content.index(b"1")] ^= 1
        weights = blob.lfs and file.endswith(".safetensors")
        if weights and hub.truncate_storage is not None:
            del content[hub.truncate_storage:]
        size = len(content)
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            start, status = int(wanted[1]), 206
            hub.resumed.append(start)
        sent = content[start:]
        if weights and hub.truncate_download is not None and self.command == "GET":
            sent = content[start:hub.truncate_download]
        self.send_response(status)
        self.send_header("ETag", f'"{blob.etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if blob.lfs:
            self.send_header("X-Linked-ETag", f'"{blob.etag}"')
            self.send_header("X-Linked-Size", str(size))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        cut = len(sent)
        if weights and hub.cut_download is not None:
            cut = min(cut, hub.cut_download)
        self.wfile.write(sent[:cut])
        if cut < len(sent):
            return self.break_off()
        return None


REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("POST", rf"/{REPO}\.git/lfs/verify", Handler.verify),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
]
