"""Take one defence away at a time, and see that a test fails: ``python -m tests.mutation.defences [word]``.

Works on a copy. Every row is a file, what stands there, what is put in its place, and the tests that must notice. A row
whose text is not found any more is an error: mend the row.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HANDLER, STORAGE, KEYS = "test_handler_attacks", "test_storage_writer", "test_capabilities"
OPERATORS = "test_operators_commands"
BRIDGE = "test_app_engine_bridge"
DASHBOARD = "../dashboard/test_guard"

PUSH = "../queues/test_push"
CELERY = "../queues/test_celery_settings"
DEFENCES = [
    ("keys.py", "if key is None or not matches:", "if key is None:", "test_handler_attacks"),
    ("keys.py", 'if key.state == "revoked":', "if False:", "test_handler_attacks"),
    ("keys.py", 'members = (\'"alg":"HS256"\'', 'members = (\'"alg":"none"\'', "test_handler_attacks"),
    ("token.py", "if not (is_canonical(self.header) and is_canonical(self.payload) and is_canonical(self.mac)):", "if False:", "../test_schema"),
    ("token.py", "if segment[-1:] in _LAST[over] and _PLUS not in segment and _SLASH not in segment:", "if True:", "../unit/test_token"),
    ("claims.py", " == payload", "", "../test_schema"),
    ("signing.py", "environment != serves.environment", "False", HANDLER),
    ("signing.py", "or (path != url if isinstance(url, str) else path not in url)", "", STORAGE),
    ("signing.py", "or (queue is not None and queue != named)", "", STORAGE),
    ("signing.py", 'if claims["nbf"] > soon or claims["iat"] > soon:', "if False:", STORAGE),
    ("signing.py", 'return now > claims["exp"] + LEEWAY', "return False", "test_ledger_attacks"),
    ("signing.py", "if key.queues is not None and queue not in key.queues:\n        raise Cap", "if False:\n        raise Cap", KEYS),
    ("signing.py", 'if cty == "pickle" and not key.pickle:', "if False:", KEYS),
    ("signing.py", 'len(data) != pointer.blob["length"] or sha256(data).hexdigest() != pointer.blob["sha256"]', "False", STORAGE),
    ("policy.py", "self._within(self._inner.check_class_name, name)\n        cls", "cls", "test_policy"),
    ("policy.py", "        self._within(self._inner.check, ref)\n        return self._outer.check(ref)", "        return self._outer.check(ref)", KEYS),
    ("sending/dead_letters.py", 'if claims["jti"] != task_id:', "if False:", "test_dead_letters"),
    ("sending/dead_letters.py", "if key.queues is not None and options.queue not in key.queues:", "if False:", KEYS),
    ("policy.py", '_deny(_callee(ref), f"it is inherited from {name}, and needs an exact pattern")', "pass", "test_inheritance"),
    ("policy.py", 'if ref.kind == "builtin_method":', "if False:", "test_implicit_callees"),
    ("claims.py", "catch_duplicate_keys=True", "catch_duplicate_keys=False", "test_parsing"),
    ("codecs/decoder.py", "if depth > self.limits.depth:", "if False:", "test_parsing"),
    ("codecs/decoder.py", "if self._items > self.limits.items:", "if False:", "test_parsing"),
    ("delivery/handler.py", "if hints.encoding is not None:", "if False:", HANDLER),
    ("delivery/handler.py", "if kind not in CONTENT_TYPES:", "if False:", HANDLER),
    ("delivery/handler.py", "_REFUSED_BODY)", "reason.encode())", HANDLER),
    ("delivery/redaction.py", "re.sub(_DOTTED, _blank, text)", "text", HANDLER),
    ("delivery/handler.py", "            del rejection", "            pass", HANDLER),
    ("web/body.py", "async with asyncio.timeout(BODY_TIMEOUT):", "if True:", HANDLER),
    ("web/body.py", "if len(body) > limit:", "if False:", HANDLER),
    ("dispatcher/transport.py", "allow_redirects=False", "allow_redirects=True", "test_ssrf"),
    ("dispatcher/request_headers.py", "    _check_hints(task)\n", "", "test_ssrf"),
    ("dispatcher/transport.py", "trust_env=False", "trust_env=True", "test_ssrf"),
    ("dispatcher/transport.py", "cookie_jar=aiohttp.DummyCookieJar()", "cookie_jar=aiohttp.CookieJar(unsafe=True)", "test_ssrf"),
    ("queues/rules.py", "if digest != execution.digest:", "if False:", "test_ledger_attacks"),
    ("queues/sqlite/batch.py", "if isinstance(failure, UnicodeDecodeError | BadValue):", "if False:", STORAGE),
    ("queues/sqlite/queue.py", "except (UnicodeDecodeError, BadValue):", "except ZeroDivisionError:", STORAGE),
    ("queues/rules.py", "if entry.state == EndState.RETRY and entry.uncharged:", "if False:", "test_captured_retries"),
    ("queues/rules.py", "return Admission.EARLY if entry.early else Admission.RUN", "return Admission.RUN", "test_captured_retries"),
    ("queues/rules.py", "return settlement.charged or settlement.rejected", "return True", "test_captured_retries"),
    ("delivery/pushed.py", "if request.progress.not_before > now:", "if False:", PUSH),
    ("delivery/begin.py", "[queue.engine.authenticate(each.headers) for each in asked]", "[True for each in asked]", PUSH),
    ("delivery/begin.py", "if engine.authenticate(each.headers) and not engine", "if not engine", PUSH),
    ("delivery/begin.py", "Admission.RUN, Progress.load(kept.get(counted)), mark", "Admission.RUN, NO_PROGRESS, mark", PUSH),
    ("delivery/begin.py", "Progress.load(kept.get(counted)), mark in kept)", "Progress.load(kept.get(counted)), False)", PUSH),
    ("queues/celery/acknowledging.py", "self._sync_at_last()\n", "self.mark\n", "../queues/test_acknowledging"),
    ("queues/celery/acknowledging.py", "if each.mark == mark else", "if True else", "../queues/test_acknowledging"),
    ("queues/celery/engine.py", " and self._left_to == os.getppid()", "", "../queues/test_acknowledging"),
    ("queues/hand_over.py", "        if self._is_buried(task):\n", "        if False:\n", PUSH),
    ("queues/hand_over.py", "        if look.gives_up(task.queue):\n", "        if False:\n", PUSH),
    ("queues/hand_over.py", "        with _forks.put_off():\n", "        if True:\n", PUSH),
    ("queues/copies.py", "0 <= value < _LATEST", "True", PUSH),
    ("queues/celery/broker.py", " and not _drops(celery)", "", CELERY),
    ("queues/celery/broker.py", "int(channel.client.hlen(channel.unacked_key)) + ", "", CELERY),
    ("queues/celery/task.py", "            setattr(cls, name, value)\n", "            pass\n", CELERY),
    ("queues/celery/engine.py", "        check_content(self.celery)\n", "", CELERY),
    ("queues/celery/engine.py", "    except Exception as error:  # Celery's", "    except ZeroDivisionError as error:  # Celery's", CELERY),
    ("queues/celery/engine.py", "                sync()  # a child", "                pass  # a child", CELERY),
    ("queues/celery/worker.py", "if self._unanswered:", "if False:", CELERY),
    ("queues/celery/worker.py", "requeue=requeue or self._unanswered", "requeue=requeue", CELERY),
    ("queues/celery/worker.py", '        self.delivery_info["redelivered"] = False\n', "", CELERY),
    ("queues/postgres/pushed.py", "if all(counted):", "if True:", "../queues/test_pushed_calls"),
    ("delivery/pushed.py", "if self._clock() > execution.expires + _LEDGER_KNOWS:", "if False:", PUSH),
    ("delivery/pushed.py", "if not queue.engine.authenticate(headers):", "if False:", PUSH),
    ("delivery/pushed.py", "now=now, verified=False)", "now=now, verified=True)", PUSH),
    ("queues/progress.py", "in {int, float} and 0 <= value < _LATEST else None", "in {int, float} else None", PUSH),
    ("queues/celery/engine.py", "return isinstance(headers, WorkerHeaders)", "return True", "../queues/test_celery"),
    ("queues/sqlite/statements.sql", "INSERT OR REPLACE INTO safedefer_dead", "INSERT INTO safedefer_dead", STORAGE),
    ("sending/builder.py", "except InvalidTaskRetryOptionsError:", "except ZeroDivisionError:", STORAGE),
    ("queues/sqlite/statements.sql", "deliveries = min(deliveries, 2147483646) + 1", "deliveries = deliveries + 1", STORAGE),
    ("queues/sqlite/statements.sql", "attempts = min(attempts, 2147483646) + :charged", "attempts = attempts + :charged", STORAGE),
    ("codecs/pickled.py", "_scan(data, self._limits)\n            # By value", "# By value", "test_pickled"),
    ("codecs/pickled.py", 'raise _Refused("the pickle calls what is neither a class nor known to be harmless")', "return", "test_pickled"),
    ("codecs/pickled.py", 'raise _Refused("the pickle changes a class, a module or a function")', "return", "test_pickled"),
    ("signing.py", '            _check_key(key, named, claims["cty"])\n            if', "            if", KEYS),
    ("signing.py", "        _check_may_sign_root(key)\n        kid", "        kid", "test_dead_letters"),
    ("signing.py", "if root.state is KeyState.REVOKED:", "if False:", "test_dead_letters"),
    ("codecs/obstacles.py", "if plan is None or _runs_code(plan):", "if plan is None:", "../unit/test_obstacles"),
    ("codecs/obstacles.py", "if type(self._registry.by_class(cls)) is RegisteredType:", "if False:", "../unit/test_obstacles"),
    ("codecs/obstacles.py", 'return type(module) is str and module != "" and module not in sys.modules', "return False", "test_refused_calls"),
    ("codecs/obstacles.py", "        if id(cls) in self.asked.admitted:", "        if False:", "test_refused_calls"),
    ("codecs/obstacles.py", "        if _imports(cls):", "        if False:", "test_refused_calls"),
    ("codecs/obstacles.py", "        if _imports(obj):\n            return _ANY", "        if False:\n            return _ANY", "test_refused_calls"),
    ("codecs/obstacles.py", "if self.look.spent > self.limits.items:", "if False:", "../unit/test_obstacles"),
    ("codecs/tags/containers.py", "    if not enc.looks_only:\n        _check_hashes(values, size)", "    _check_hashes(values, size)", "../unit/test_obstacles"),
    ("codecs/tags/containers.py", "    if not enc.looks_only:\n        _check_hashes((key", "    if True:\n        _check_hashes((key", "../unit/test_obstacles"),
    ("codecs/tags/containers.py", "dict.items(value) if enc.looks_only else value.items()", "value.items()", "../unit/test_obstacles"),
    ("codecs/tags/exceptions.py", "_kept(value, plan) if enc.looks_only else ", "", "test_refused_calls"),
    ("policy.py", "if definer is cls or any(", "if True or any(", "test_implicit_callees"),
    ("codecs/decoder.py", "        self.add(items)\n        self._deepest", "        self._deepest", "test_bounded_work"),
    ("codecs/decoder.py", "if self.keyed and reached in self.open:", "if self.keyed and number in self.open:", "test_impossible_objects"),
    ("codecs/decoder.py", "for definer in self._hashing.values():", "for definer in ():", "test_inheritance"),
    ("codecs/field_defaults.py", "    add(len(missing))\n", "", "test_bounded_work"),
    ("codecs/types/generics.py", "if sum(count(each) for each in args) > MOST_ARGUMENTS:", "if False:", "test_bounded_work"),
    ("codecs/type_arguments.py", "        making()\n", "", "test_bounded_work"),
    ("codecs/tags/objects.py", "(held is object or held is int) and ", "", "test_inheritance"),
    ("refs.py", 'if issubclass(cast("type", obj), type) or (', "if False and (", "test_implicit_callees"),
    ("sending/builder.py", '"args": {"names": names}', '"args": names', "test_unique_calls"),
    ("codecs/tags/containers.py", "    if most > MAX_EQUAL_HASHES:", "    if False:", "test_bounded_work"),
    ("codecs/tags/patterns.py", "    if dec.folded > MAX_FOLDED:", "    if False:", "test_bounded_work"),
    ("delivery/budget.py", "if size > self._left:", "if False:", "../web/test_handler"),
    ("queues/sqlite/bell.py", "not stat.S_ISFIFO(status.st_mode) or ", "", "../queues/test_sqlite_bell"),
    ("queues/sqlite/bell.py", " or status.st_nlink != 1", "", "../queues/test_sqlite_bell"),
    ("queues/sqlite/bell.py", " or owner not in {None, status.st_uid}", "", "../queues/test_sqlite_bell"),
    ("queues/sqlite/bell.py", " | os.O_NOFOLLOW", "", "../queues/test_sqlite_bell"),
    ("queues/sqlite/bell.py", "place = os.open(path, os.O_PATH", "place = os.open(path, os.O_RDONLY | os.O_NONBLOCK", "../queues/test_sqlite_bell"),
    ("queues/sqlite/watch.py", "            if self._alarms >= _FALSE_ALARMS:\n", "            if False:\n", "../queues/test_sqlite_bell"),
    ("queues/sqlite/watch.py", "        if self._alarms >= _FALSE_ALARMS:\n            self._rest", "        if False:\n            self._rest", "../queues/test_sqlite_bell"),
    ("dispatcher/signed_route.py", "if (what := difference(task, claims)) is not None:", "if (what := None) is not None:", "test_ssrf"),
    ("queues/sqlite/trust.py", "trouble = trouble_with_owner(", "trouble = None and trouble_with_owner(", "test_queue_file"),
    ("settings.py", "            if trouble is None:", "            if True:", "test_key_files"),
    ("queues/rules.py", "    if len(text) <= _LOOKED_AT:", "    if True:", OPERATORS),
    ("queues/rules.py", '(?:[^"\\\\]++|\\\\.)*+"?|', '(?:[^"\\\\]++|\\\\.)*+"|', OPERATORS),
    ("queues/postgres/rows.py", "if type(text) is str and unfolds(text, objects=_OBJECTS):", "if False:", OPERATORS),
    ("cli/common.py", "return value if math.isfinite(value) else None", "return value", OPERATORS),
    ("cli/common.py", "for each in value] if levels else None", "for each in value]", OPERATORS),
    ("cli/root.py", 'plain(" ".join(str(error).splitlines()))', "str(error)", OPERATORS),
    ("cli/common.py", "if math.isnan(found):", "if False:", OPERATORS),
    ("sending/dead_letters.py", "except (RejectedTask, DeferError, BlobsFull)", "except (RejectedTask, DeferError)", OPERATORS),
    ("delivery/runs.py", "            self.abandoned += abandoned", "            self.abandoned += abandoned\n            self.runs += 1", OPERATORS),
    ("queues/sqlite/trust.py", "if connection.execute(_SHARED_PAGES).get is not None:", "if False:", "test_queue_file"),
    ("queues/sqlite/trust.py", "if trouble is None and suffix and status.st_nlink > 1:", "if False:", "test_queue_file"),
    ("transactions/transfer.py", "            FOR UPDATE SKIP LOCKED\n", "", "test_outbox_neighbours"),
    ("transactions/tables.py", "CASE WHEN a.attname OPERATOR(pg_catalog.~) '^[a-z]+$' THEN a.attname ELSE '?' END", "a.attname", "test_outbox_neighbours"),
    ("transactions/tables.py", "elif expressions:", "elif False:", "test_outbox_rows"),
    ("transactions/databases/datastore.py", "or not 1 <= pieces <= _PIECES", "or False", "../datastore/test_hostile_entities"),
    ("transactions/datastore.py", "if 0 < len(each) <= ID_LENGTH", "if True", "../datastore/test_hostile_entities"),
    ("transactions/datastore.py", "while keys := reader.keys(after):", "if keys := reader.keys(after):", "../datastore/test_hostile_entities"),
    ("transactions/datastore.py", "self._aside.add(task_id)", "pass", "../datastore/test_hostile_entities"),
    ("transactions/datastore.py", "if done.is_away and done.failure is not None:", "if done.failure is not None:", "../datastore/test_sweeps"),
    ("transactions/datastore.py", "self._pause(task.id)", "pass", "../datastore/test_sweeps"),
    ("transactions/datastore.py", " or not self._judge.is_mine(place, task)", "", "../datastore/test_sweeps"),
    ("transactions/databases/datastore.py", "batch.more_results != batch.MoreResultsType.NOT_FINISHED", "True", "../datastore/test_sweeps"),
    ("transactions/databases/datastore.py", ", list(answer.deferred)", ", []", "../datastore/test_sweeps"),
    ("transactions/handover.py", "if environment_of(task) != self.environment:", "if False:", "../datastore/test_hostile_entities"),
    ("cli/worker.py", ", file=self._errors", "", "../acceptance/test_harmful_tasks"),
    ("cli/supervisor.py", "os.killpg(worker.process.pid, signal.SIGKILL)", "pass", "../acceptance/test_harmful_tasks"),
    ("dashboard/seals.py", "key.state is KeyState.REVOKED or _is_limited(key)", "key.state is KeyState.REVOKED", "../dashboard/test_seals"),
    ("dashboard/seals.py", "if not secrets.compare_digest(", "if False and not secrets.compare_digest(", "../dashboard/test_seals"),
    ("dashboard/access.py", "expires < self._clock() or session_id in self._used", "expires < self._clock()", "../dashboard/test_access"),
    ("dashboard/access.py", "environment != self._environment or ", "", "../dashboard/test_access"),
    ("dashboard/guard.py", 'if sites == ["same-origin"]:', "if True:", DASHBOARD),
    ("dashboard/guard.py", "urlsplit(origins[0]).netloc == request.host and request.host", "True", DASHBOARD),
    ("dashboard/guard.py", "if not self.sessions.is_form_field(", "if False and not self.sessions.is_form_field(", DASHBOARD),
    ("dashboard/guard.py", "if not isinstance(allowed, Access) or not allowed.reads_something:", "if allowed is None:", DASHBOARD),
    ("dashboard/site.py", 'if request.method not in {"GET", "HEAD"}:', "if False:", DASHBOARD),
    ("dashboard/actions.py", "        if not access.may_act(queue):", "        if False:", DASHBOARD),
    ("dashboard/actions.py", "            self._check_signed_queue(access, view)\n            task", "            task", DASHBOARD),
    ("dashboard/pages.py", "if claims is not None and not access.may_read(", "if False and not access.may_read(", DASHBOARD),
    ("dashboard/lookup.py", "return search_text(claims) if access.may_read(", "return search_text(claims) if True or access.may_read(", DASHBOARD),
    ("dashboard/render.py", "autoescape=True", "autoescape=False", "../dashboard/test_pages"),
    ("dashboard/actions.py", 'if str(len(ids)) != values.get("count"):', "if False:", "../dashboard/test_actions"),
    ("delivery/pushed.py", "max(task.created, sent or 0.0) + kept", "(sent or 0.0) + kept", "../cloudtasks/test_end_to_end"),
    ("delivery/pushed.py", "if found.admission is None:", "if False:", "../cloudtasks/test_end_to_end"),
    ("queues/cloudtasks/engine.py", 'and ("GAE_APPLICATION" in os.environ or address.endpoint is not None)', "", "../cloudtasks/test_engine"),
    ("queues/cloudtasks/oidc.py", 'if header.get("alg") != _ALGORITHM or not isinstance(kid, str):', "if not isinstance(kid, str):", "test_oidc"),
    ("queues/cloudtasks/oidc.py", "payload = jwt.PyJWS().decode(token, key, algorithms=[_ALGORITHM])", 'payload = jwt.PyJWS().decode(token, options={"verify_signature": False})', "test_oidc"),
    ("queues/cloudtasks/oidc.py", "len(given) != 1 or len(given[0]) > _LONGEST", "len(given) != 1", "test_oidc"),
    ("queues/cloudtasks/oidc.py", "if len(given) != 1 or", "if not given or", "test_oidc"),
    ("queues/cloudtasks/oidc.py", 'claims.get("email_verified") is not True', 'not claims.get("email_verified")', "test_oidc"),
    ("queues/cloudtasks/oidc.py", "type(issued) is not int or type(expires) is not int or ", "", "test_oidc"),
    ("queues/cloudtasks/oidc.py", "if not issued - SKEW <= now < expires + SKEW:", "if False:", "test_oidc"),
    ("queues/cloudtasks/oidc.py", '("aud", self._audiences), ', "", "test_oidc"),
    ("queues/cloudtasks/oidc.py", ', ("email", self._emails))', ")", "test_oidc"),
    ("queues/cloudtasks/oidc.py", '(("iss", self._issuers), ', "(", "test_oidc"),
    ("queues/cloudtasks/oidc.py", " and now - self._tried >= REFETCH", "", "test_oidc"),
    ("queues/cloudtasks/oidc.py", " if now - self._fetched <= _STALE else None", "", "test_oidc"),
    ("queues/cloudtasks/oidc.py", "if key.key.key_size >= _LEAST_BITS:", "if True:", "test_oidc"),
    ("queues/cloudtasks/oidc.py", "allow_redirects=False", "allow_redirects=True", "test_oidc"),
    ("migrate/app_engine.py", "elif type(each) not in _ATOMS:", "elif False:", BRIDGE),
    ("migrate/app_engine.py", "if self._spent > _MOST_COPIED:", "if False:", BRIDGE),
    ("migrate/app_engine.py", "if self._odd_keys > _MOST_NODES:", "if False:", BRIDGE),
    ("migrate/app_engine.py", "if nodes > _MOST_NODES:", "if False:", BRIDGE),
    ("migrate/app_engine.py", "if self._clock() >= self._until:", "if False:", BRIDGE),
    ("migrate/app_engine.py", "if plan.base is not object or any(hooks) or plan.tag not in _TAGS:", "if False:", BRIDGE),
    ("migrate/app_engine.py", "if name in plan.functions:", "if False:", BRIDGE),
    ("migrate/opcodes.py", "if self._pushed > _MOST_VALUES:", "if False:", BRIDGE),
]  # fmt: skip


def survives(folder, file, old, new, test):
    """Whether all tests pass without the defence."""
    path = folder / "safedefer" / file
    text = path.read_text()
    if old not in text:
        raise SystemExit(f"{file}: {old!r} is not there any more; mend the row")
    path.write_text(text.replace(old, new))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "--timeout",
            "60",
            f"tests/adversarial/{test}.py",
        ]
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=300, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_text(text)


def main(word=""):
    survived = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "copy")
        shutil.copytree(
            ROOT, folder, ignore=shutil.ignore_patterns(".git", "__pycache__", ".hypothesis", "node_modules", ".venv*")
        )
        for row in DEFENCES:
            if word in " ".join(row):
                alive = survives(folder, *row)
                survived += alive
                print("SURVIVED" if alive else "noticed ", row[0], "|", " ".join(row[1].split())[:90], flush=True)
    return survived


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
