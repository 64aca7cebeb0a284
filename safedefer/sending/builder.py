"""A call becomes a signed task for the queue: its claims, its token, the hints beside it, and what ``unique`` compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from typing import Any, Final, cast

from safedefer.blobs import Blob
from safedefer.callables.wrappers import unwrapped
from safedefer.claims import Call, Claims, Retry, callable_name, split_audience, write_json
from safedefer.codecs.protocol import Codec
from safedefer.codecs.typed import TypedCodec
from safedefer.errors import (
    ConfigurationError,
    DeferError,
    InvalidTaskError,
    InvalidTaskRetryOptionsError,
    NotDeferrable,
)
from safedefer.execution.binding import check_binds, named_arguments
from safedefer.keys import Key
from safedefer.options import DEFAULT_OPTIONS, Options, Task, TaskRetryOptions
from safedefer.queues.base import UNTIL_START, QueuedTask, TaskView
from safedefer.refs import UNBOUND, CallableRef, bound_object
from safedefer.sending.advice import tell_all, tell_more
from safedefer.sending.ids import new_blob_id, new_task_id
from safedefer.sending.routes import Routes
from safedefer.sending.test_mode import TEST_MODE, refuse
from safedefer.signing import Signer, shared_claims

#: In the order in which they are written: another one is read more slowly.
_CLAIMS: Final = tuple(Claims.__annotations__)
#: What two tasks of the same call may differ in: the time, how they are tried again, and where they come from.
_OF_ONE_TASK: Final = frozenset(
    {"jti", "iat", "nbf", "exp", "retry", "deadline", "trace", "headers", "root", "retry_of"}
)


class Builder:
    """Makes tasks of calls.

    Args:
        signer: Signs their claims.
        key: The key that it signs with.
        codecs: By ``cty``.
        routes: Where tasks may go.
        inline_limit: Tokens above this many bytes become blobs.
        clock: Seconds since the epoch.
        trace: Returns the W3C ``traceparent`` that a task is signed with, or None.

    Raises:
        ConfigurationError: ``inline_limit`` is not a whole number, 1 or more.
    """

    def __init__(
        self,
        *,
        signer: Signer,
        key: Key,
        codecs: Mapping[str, Codec],
        routes: Routes,
        inline_limit: int,
        clock: Callable[[], float],
        trace: Callable[[], str | None] | None = None,
    ) -> None:
        if type(inline_limit) is not int or inline_limit < 1:
            raise ConfigurationError("inline_limit is a whole number, 1 or more")
        self._signer = signer
        self._key = key
        self._codecs = codecs
        self._routes = routes
        self.inline_limit = inline_limit
        self._clock = clock
        self._trace = trace
        self.in_test = False
        """Whether its tasks go to the queue of a ``TestApp``."""

    def build(
        self, options: Options, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Task, QueuedTask]:
        """Return the task of a call, and what the queue is given.

        Raises:
            TypeError: The callable does not take these arguments.
            DeferError: One of its subclasses says what is wrong.
        """
        try:
            self._routes.check(options)
        except DeferError as error:
            tell_more(error, partial(self._routes.check_target, options))
            if not options.pickle:  # to pickle runs code of the values
                tell_more(error, partial(self._claims, options, obj, args, kwargs, self._clock()))
            raise
        now = self._clock()
        claims = self._claims(options, obj, args, kwargs, now)
        if self._trace is not None and (trace := self._trace()) is not None:
            claims["trace"] = trace
        task, queued = self.package(claims, options, now)
        if options.unique:
            if isinstance(options.unique, bool):
                ordered = dict(sorted(kwargs.items()))
                # The order of keywords numbers what they share.
                same = claims if list(ordered) == list(kwargs) else self._claims(options, obj, args, ordered, now)
                key = _unique_key(same)
            else:
                key = self._key_of_some(options, options.unique, claims, obj, args, kwargs)
            queued = queued._replace(unique_key=UNTIL_START + key if options.unique_until == "start" else key)
        return task, queued

    def _key_of_some(
        self,
        options: Options,
        names: Sequence[str],
        claims: Claims,
        obj: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> str:
        """Return the key of calls that are the same if some arguments are, and the object that a method belongs to."""
        try:
            chosen = named_arguments(obj, names, args, kwargs)
        except LookupError as error:
            raise InvalidTaskError(f"unique names an argument, but {error.args[0]}") from None
        # Apart from the others: what these share with them numbers nothing.
        codec = self._pickled() if options.pickle else self._codecs["typed"]
        bound, _, named = codec.encode((bound_object(obj), (), chosen), self._signer.gate)
        call = dict(claims["call"])
        if bound is not UNBOUND:
            call["bound"] = bound
        # An array is the arguments of a call that is compared whole: names in one would be texts that somebody passed.
        same: dict[str, object] = {**claims, "call": call, "args": {"names": names}, "kwargs": named}
        return _unique_key(same)

    def callable_ref(self, obj: Callable[..., object]) -> CallableRef:
        """Name the callable of a call. Raises ``NotDeferrable``."""
        return self._signer.gate.callable_ref(unwrapped(obj))

    def serialize(self, obj: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
        """Return the signed token of a call without options."""
        return self._signer.sign(self._claims(DEFAULT_OPTIONS, obj, args, kwargs, self._clock()))

    def package(self, claims: Claims, options: Options, now: float) -> tuple[Task, QueuedTask]:
        """Sign claims, and wrap the token for the queue: as a blob with a pointer where it is oversize.

        Raises:
            ConfigurationError: A ``TestApp`` is active, and this application is not in test mode.
            DeferError: The claims cannot be signed.
        """
        if TEST_MODE.active and not self.in_test:
            refuse()
        payload = token = self._signer.sign(claims)
        digest = sha256(token)
        blob = None
        if len(token) > self.inline_limit:
            blob = Blob(new_blob_id(), token)
            pointer = {"id": blob.id, "sha256": digest.hexdigest(), "length": len(token)}
            shared = {**shared_claims(claims), "iat": claims["iat"], "blob": pointer}
            payload = self._signer.sign(in_order(shared))
        eta = options.due(now)
        _, queue, target, url = split_audience(claims["aud"])
        trace = claims.get("trace")
        headers = {**options.headers, **({"traceparent": trace} if trace is not None else {})}
        queued = QueuedTask(
            id=claims["jti"],
            queue=queue,
            token=payload,
            audience=claims["aud"],
            url=url,
            target=target,
            eta=eta,
            created=now,
            expires=claims["exp"],
            name=claims.get("name"),
            headers=headers,
            retry_options={} if options.retry_options is None else options.retry_options.given(),
            digest=digest.digest(),
            blob=blob,
            blob_id=None if blob is None else blob.id,
            callable_name=callable_name(claims["call"]),
            deadline=self._routes.deadline(queue, claims.get("deadline")),
        )
        task = Task(
            id=queued.id,
            name=queued.name,
            queue_name=queue,
            url=url,
            target=target,
            headers=headers,
            payload=payload,
            eta=datetime.fromtimestamp(eta, UTC),
            retry_options=options.retry_options,
            was_enqueued=True,
        )
        return task, queued

    def _claims(
        self,
        options: Options,
        obj: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        now: float,
    ) -> Claims:
        gate = self._signer.gate
        target: Any = unwrapped(obj)
        try:
            ref = gate.callable_ref(target)
            try:
                check_binds(target, args, kwargs)
            except TypeError as error:
                raise TypeError(
                    f"{ref} does not take these arguments: {error}; defer() passes them on as they are"
                ) from None
            codec = self._pickled() if options.pickle else self._codecs["typed"]
            # What makes a call unique is compared as trees, whose members can be sorted.
            encode = codec.encode if options.unique else codec.write
            bound, positional, named = encode((bound_object(target), tuple(args), dict(kwargs)), gate)
        except TypeError as error:  # NotDeferrable and UnencodableArgument are such errors
            if not options.pickle:  # to look at more values would pickle them
                typed = cast("TypedCodec", self._codecs["typed"])
                tell_all(error, typed, gate, target, args, kwargs)
            tell_more(error, partial(options.due, now))  # a closure would slow the way of every call down
            raise
        made = due = int(now)
        audience, lifetime = self._routes.default
        if options is not DEFAULT_OPTIONS:
            due = int(options.due(now))
            audience, lifetime = self._routes.of(options)
        # Every part was checked by itself.
        claims: Claims = {
            "v": 1,
            "jti": new_task_id(now),
            "iat": made,
            "nbf": due,
            "exp": due + lifetime,
            "aud": audience,
            "cty": "pickle" if options.pickle else "typed",
        }
        if options.name is not None:
            claims["name"] = options.name
        call: Call = {"kind": ref.kind, "module": ref.module, "qualname": ref.qualname}
        if ref.member is not None:
            call["member"] = ref.member
        if bound is not UNBOUND:
            call["bound"] = bound
        claims["call"] = call
        claims["args"] = positional
        claims["kwargs"] = named
        if options is not DEFAULT_OPTIONS:
            _add_options(claims, options)
        return claims

    def _pickled(self) -> Codec:
        """Return the codec of pickled arguments. Raises ``NotDeferrable`` if they may not be sent."""
        codec = self._codecs.get("pickle")
        if codec is None:
            raise NotDeferrable("pickled arguments are off; make the App with allow_pickle=True", reason="pickle-off")
        if not self._key.pickle:
            raise NotDeferrable(
                f"key {self._key.kid} may not sign pickled arguments; give it pickle=True, or use another",
                reason="pickle-key",
            )
        return codec


def _add_options(claims: Claims, options: Options) -> None:
    """Add the claims that end a token: how and with which headers the task is delivered."""
    if options.retry_options is not None:
        claims["retry"] = cast("Retry", options.retry_options.given())
    if options.deadline is not None:
        claims["deadline"] = options.deadline
    if options.headers:
        claims["headers"] = dict(options.headers)


def in_order(claims: Mapping[str, object]) -> Claims:
    """Return claims in the order in which they are written."""
    return cast("Claims", {name: claims[name] for name in _CLAIMS if name in claims})


def stored_task(view: TaskView | QueuedTask) -> Task:
    """Return a task that the queue has, as ``defer()`` returned it."""
    return Task(
        id=view.id,
        name=view.name,
        queue_name=view.queue,
        url=view.url,
        target=view.target,
        headers=view.headers,
        payload=view.token,
        eta=datetime.fromtimestamp(view.eta, UTC),
        retry_options=stored_retry_options(view.retry_options),
        was_enqueued=True,
    )


def stored_retry_options(values: Mapping[str, float]) -> TaskRetryOptions | None:
    """Return the retry options that the storage keeps of a task; None if there are none, or they are impossible."""
    try:
        return TaskRetryOptions.from_given(values) if values else None
    except InvalidTaskRetryOptionsError:  # a hint in the storage, which nobody signed: the queue's own will do
        return None


def _unique_key(claims: Mapping[str, object]) -> str:
    """Return what tasks of the same call and destination have in common."""
    same = {name: value for name, value in claims.items() if name not in _OF_ONE_TASK}
    return sha256(write_json(same)).hexdigest()
