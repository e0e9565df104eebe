"""A W&B server for tests, on loopback: takes runs and their rows, and misbehaves as it is told.

    with fake_wandb.Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)   # and WANDB_API_KEY: any 40 letters
        server.behave = "hang"                             # or "ok", 401, 500: every later request
        server.rows, server.ends

Covers what wandb-core 0.28 to 0.31 asks during a run and a sync (GraphQL and the file stream), when a run is looked up
and when a report is saved. It proves nothing about what the real server does with the answers.
"""

import gzip
import http.server
import json
import re
import threading
from types import TracebackType
from typing import Any, Literal, Self


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, address: Any) -> None:
        """Nothing: clients that were killed close their connections as they please."""


class Server:
    """One project of one user. `behave` may be changed at any time."""

    def __init__(self, behave: Literal["ok", "hang"] | int = "ok") -> None:
        self.behave: Literal["ok", "hang"] | int = behave
        self.rows: dict[str, list[dict[str, Any]]] = {}
        """History of each run, by id."""
        self.ends: list[dict[str, Any]] = []
        """What the file stream said last of each run: complete, exitcode, preempting."""
        self.refuses: dict[str, int] = {}
        """Status by the last word of an address (graphql, file_stream, files): nothing that is sent there is kept."""
        self.holds_at: int | None = None
        """Of each run so many rows are kept, then the file stream gets no answer any more."""
        self.runs: list[dict[str, Any]] = []
        """What was said of runs, each time."""
        self.artifacts: dict[str, tuple[str, list[str]]] = {}
        """(type, names of the files that are kept here) of each, by name."""
        self.used: list[str] = []
        """Artifacts that a run took as its input."""
        self.takes_artifacts = True
        self.views: dict[str, dict[str, Any]] = {}
        """Reports by id: displayName, description, type, spec (text)."""
        self.asked = threading.Event()
        """Set by the first request."""
        self._over = threading.Event()
        self._http = _Quiet(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: a test has nobody to read it."""

            def answer(self) -> None:
                server.asked.set()
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                status, found = 200, {}
                if server.behave == "hang":
                    server._over.wait()
                    self.close_connection = True
                    return
                if isinstance(server.behave, int):
                    status = server.behave
                elif refused := server.refuses.get(self.path.split("/")[-1]):
                    status = refused
                elif self.path.endswith("/graphql"):
                    asked = json.loads(body)
                    found = {"data": server.query(asked)}
                    if "mutation CreateArtifact" in asked["query"] and not server.takes_artifacts:
                        found = {"data": None, "errors": [{"message": "no room for artifacts"}]}
                elif self.path.endswith("/file_stream") and not server.stream(
                    self.path.split("/")[-2], json.loads(body)
                ):
                    server._over.wait()
                    self.close_connection = True
                    return
                content = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer

        return Handler

    def query(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        values = asked.get("variables") or {}
        project = {"id": "p", "name": "vitdist", "entity": {"id": "e", "name": "me"}}
        match name and name[1]:
            case "Viewer":
                return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "UpsertBucket":
                self.runs.append(values)
                run, new = values["name"], values["name"] not in self.rows
                self.rows.setdefault(run, [])
                about = {"id": run, "name": run, "displayName": run, "config": "{}", "sweepName": None}
                return {"upsertBucket": {"bucket": about | {"project": project}, "inserted": new}}
            case "RunResumeStatus":
                return {"model": project | {"bucket": self._known(values["name"])}}
            case "CreateRunFiles":
                files = [{"name": file, "uploadUrl": f"{self.url}/files"} for file in values.get("files", [])]
                return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                which = values["input"]["artifactCollectionName"]
                if self.takes_artifacts:
                    self.artifacts[which] = (values["input"]["artifactTypeName"], [])
                sequence = {"id": "S", "latestArtifact": None}
                return {"createArtifact": {"artifact": {"id": which, "state": "PENDING", "artifactSequence": sequence}}}
            case "CreateArtifactManifest":
                file = {"id": "F", "name": "m", "displayName": "m", "uploadUrl": f"{self.url}/files"}
                made = {"id": values["artifactID"], "file": file | {"uploadHeaders": []}}
                return {"createArtifactManifest": {"artifactManifest": made}}
            case "CreateArtifactFiles":
                edges = [self._file(one) for one in values["input"]["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": values["artifactID"], "digest": "d"}}}
            case "UseArtifact":
                self.used.append(values["input"]["artifactID"])
                return {"useArtifact": {"artifact": {"id": values["input"]["artifactID"]}}}
            case "ArtifactByID":
                return {"artifact": self._artifact(values["id"])}
            case "Run" | "RunHistoryKeys":
                return {"project": {"run": self._known(values["name"])}}
            case "GetDefaultEntity":
                return {"viewer": {"id": "u", "entity": "me"}}
            case "ProjectInternalId":
                return {"project": {"id": "p", "internalId": "UHJvamVjdDox"}}
            case "GetProjects":
                node = {"id": "p", "name": "vitdist", "entityName": "me", "isBenchmark": False, "user": None}
                edges = [{"node": node | {"createdAt": "2026-01-01T00:00:00Z"}, "cursor": "c"}]
                return {"models": {"edges": edges, "pageInfo": {"endCursor": "c", "hasNextPage": False}}}
            case "Runs":
                wanted = json.loads(values["filters"])["name"]["$in"]
                edges = [{"node": self._known(run), "cursor": "c"} for run in wanted if run in self.rows]
                runs = {"edges": edges, "pageInfo": {"endCursor": "c", "hasNextPage": False}}
                return {"project": {"internalId": "1", "runCount": len(edges), "readOnly": False, "runs": runs}}
            case "upsertView":
                view = values["id"] or f"Vmlldz{len(self.views):06d}"
                self.views[view] = values
                return {"upsertView": {"view": self._view(view), "inserted": not values["id"]}}
            case "SpecificReport":
                return {"view": self._view(values["reportId"])}
            case _:
                return {}

    def _file(self, wanted: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[wanted["artifactID"]][1].append(wanted["name"])
        place = {"uploadUrl": f"{self.url}/files", "uploadHeaders": [], "uploadMultipartUrls": None}
        return {"node": place | {"storagePath": "x", "artifact": {"id": wanted["artifactID"]}}}

    def _artifact(self, which: str) -> dict[str, Any]:
        project = {"id": "p", "internalId": "1", "name": "vitdist", "entity": {"name": "me"}, "entityName": "me"}
        sequence = {"__typename": "ArtifactSequence", "name": which, "project": project}
        about = {"id": which, "artifactSequence": sequence, "artifactType": {"name": self.artifacts[which][0]}}
        about |= {"versionIndex": 0, "digest": "d", "state": "COMMITTED", "size": 1, "fileCount": 1, "aliases": []}
        about |= {"createdAt": "2026-01-01T00:00:00Z", "updatedAt": None, "description": None, "metadata": "{}"}
        about |= {"commitHash": "c", "historyStep": None, "ttlDurationSeconds": -1, "ttlIsInherited": True, "tags": []}
        return about

    def _known(self, run: str) -> dict[str, Any] | None:
        if run not in self.rows:
            return None
        lines = self.rows[run]
        counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]), "eventsTail": "[]"}
        about = {"id": run, "name": run, "displayName": run, "config": "{}", "summaryMetrics": "{}", "tags": []}
        keys = {"historyKeys": {"lastStep": max((line["_step"] for line in lines), default=-1)}}
        more = {"wandbConfig": '{"t": 1}', "notes": None, "projectId": "1", "state": "running", "systemMetrics": "{}"}
        return about | counts | tails | keys | more

    def _view(self, view: str) -> dict[str, Any] | None:
        if view not in self.views:
            return None
        project = {"id": "p", "name": "vitdist", "entityName": "me"}
        about = {key: self.views[view][key] for key in ("type", "name", "displayName", "description", "spec")}
        return about | {"id": view, "project": project, "createdAt": None, "updatedAt": "2026-01-01T00:00:00Z"}

    def stream(self, run: str, sent: dict[str, Any]) -> bool:
        """Rows of a run, and whether it is at its end. Returns whether that gets an answer."""
        part = (sent.get("files") or {}).get("wandb-history.jsonl")
        if part:
            lines = self.rows.setdefault(run, [])
            start, rows = part["offset"], [json.loads(line) for line in part["content"]]
            kept = rows if self.holds_at is None else rows[: max(self.holds_at - start, 0)]
            lines[start : start + len(kept)] = kept
            if len(lines) == self.holds_at:
                return False
        if sent.get("complete") is not None or sent.get("preempting"):
            self.ends.append({key: sent.get(key) for key in ("complete", "exitcode", "preempting")})
        return True
