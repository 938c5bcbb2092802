"""What fsspec reaches: whose options go where, what is tried again, and nothing secret in any message."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec

from dfx.errors import CallError

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds within which what fails for the moment is tried again."""
PACKAGES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
PACKAGES |= dict.fromkeys(("abfs", "abfss", "az", "adl"), "azure")
"""Which extra of dfx reaches a protocol."""
MOMENTARY = {408, 409, 429, 500, 502, 503, 504}
"""HTTP's states that pass; 409 is what S3 answers to create-only puts that meet."""
BROKEN = {"ConnectionError", "TimeoutError", "FSTimeoutError"}
BROKEN |= {"ClientConnectionError", "ClientPayloadError"}  # aiohttp
BROKEN |= {"HTTPClientError", "IncompleteReadError", "ResponseParserError"}  # botocore
BROKEN |= {"ServiceRequestError", "ServiceResponseError"}  # azure-core
"""Classes of errors of connections, by name: the libraries they belong to need not be installed."""
FINAL = {"SSLError", "ClientConnectorCertificateError", "ClientConnectorSSLError"}
"""Those among them that another try does not mend."""


OBJECTS = {"s3", "s3a", "gs", "gcs"}
"""Protocols whose paths are keys of objects: "?" and "::" are ordinary characters of a key."""
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_FILE = re.compile(r"file://(?:localhost(?=/))?", re.IGNORECASE)
_SECRET = re.compile(r"sig=|signature|credential|token|secret|passw|access_?key|api_?key|auth", re.IGNORECASE)


def is_remote(address: object) -> bool:
    """Whether an address is a URL of fsspec, or a chain of them, such as "simplecache::s3://bucket/key".

    Everything else is a path, whatever letters it has: only the beginning counts. A `file://` URL is a path, too.
    """
    return isinstance(address, str) and _URL.match(address) is not None and _FILE.match(address) is None


def local_path(address: str | Path) -> Path:
    """Give the path of an address that is not a URL of fsspec.

    A `file://` URL is percent-decoded (RFC 8089), unless only a file with the undecoded name exists. "~" is the user's
    folder, unless there is a file of that name.
    """
    text = os.fspath(address)
    url = _FILE.match(text) if isinstance(address, str) else None
    if url is not None:
        plain, decoded = text[url.end() :], unquote(text[url.end() :], errors="surrogateescape")
        return Path(plain if os.path.lexists(plain) and not os.path.lexists(decoded) else decoded)
    if text.startswith("~"):
        return Path(os.path.abspath(text) if os.path.lexists(text) else os.path.expanduser(text))  # noqa: PTH100, PTH111
    return Path(address)


def is_key(url: str) -> bool:
    """Whether "?" is part of a URL's path: keys of objects have no query, unless it looks like a secret."""
    return url.partition("://")[0].lower() in OBJECTS and _SECRET.search(url.partition("?")[2]) is None


def suffix(address: str | Path) -> str:
    """Give the suffix of a path or URL in lower case, with its dot."""
    if is_remote(address):
        address = str(address).partition("?versionId=" if is_key(str(address)) else "?")[0]
    return Path(address).suffix.lower()


def shown(address: str) -> str:
    """Redact an address for messages and stores: remove its password and its query."""
    if not is_remote(address):
        return address
    bare = re.sub(r"://[^/@:]*:[^/@]*@", "://", address)
    links = bare.split("::") if is_chain(bare) else [bare]
    return "::".join(link if is_key(link) else link.partition("?")[0] for link in links)


def is_chain(url: str) -> bool:
    """Whether a URL leads through several file systems; in the paths of buckets and servers, "::" means nothing."""
    return "::" in url and url.partition("://")[0].lower() not in PACKAGES


def options_for(url: str, storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Pick the options of a URL's file system.

    `storage_options` are those of every URL, or a mapping of protocols ("s3") and URL prefixes
    ("s3://bucket/out") to such: the longest prefix goes before the protocol.
    """
    if not storage_options:
        return {}
    known = fsspec.available_protocols()
    if not all(("://" in key or key in known) and isinstance(o, Mapping) for key, o in storage_options.items()):
        return dict(storage_options)
    if is_chain(url):  # fsspec has each link's options under its protocol
        links = {link.partition("://")[0] for link in url.split("::")}
        return {name: dict(storage_options[name]) for name in sorted(links & storage_options.keys())}
    inside = (key for key in storage_options if "://" in key and f"{url}/".startswith(f"{key.rstrip('/')}/"))
    protocol = url.partition("://")[0]
    return dict(storage_options.get(max(inside, key=len, default=protocol), {}))


def filesystem(url: str, options: Mapping[str, Any], *, asynchronous: bool = False) -> tuple[Any, str]:
    """Give a URL's file system, of which fsspec keeps one a thread, and the path on it; raises `CallError`."""
    wanted = {**options, **({"asynchronous": True} if asynchronous else {})}
    try:
        fs, path = open_filesystem(url, wanted)
        if asynchronous and not fs.async_impl:
            from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

            fs = AsyncFileSystemWrapper(fs, asynchronous=True)
        return fs, str(path)
    except ImportError as e:
        extra = PACKAGES.get(url.partition("://")[0])
        remedy = f"pip install dfx[{extra}], here and on the workers" if extra else told(e, url, options)
        problem = f"{shown(url)} needs a package that is not installed: {remedy}."
    except Exception as e:  # unknown protocols and options: ValueError, TypeError and what each file system raises
        problem = f"{shown(url)} can't be reached ({told(e, url, options)}): check the URL and storage_options."
    raise CallError(problem)


def open_filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Give a URL's file system and the path on it; `url_to_fs` of fsspec treats every "::" as a chain."""
    if "::" not in url or is_chain(url):
        fs, path = fsspec.core.url_to_fs(url, **options)
        return fs, path
    protocol = url.partition("://")[0]
    kind = fsspec.get_filesystem_class(protocol)
    return fsspec.filesystem(protocol, **{**kind._get_kwargs_from_urls(url), **options}), kind._strip_protocol(url)


def told(error: BaseException, url: str, options: Mapping[str, Any]) -> str:
    """Say what an error says, without anything of the options or of a URL's query."""
    text = f"{type(error).__name__}: {error}".replace(url, shown(url))
    for secret in sorted(texts(options), key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_queries(text)


def without_queries(text: str) -> str:
    """Redact the URLs in a text."""
    return re.sub(r"\b[a-zA-Z][\w+.-]*://[^\s'\"?]*(?:\?[^\s'\")]*)?", lambda found: shown(found[0]), text)


def texts(options: object) -> Iterator[str]:
    """Give the texts in options, however deep, that are long enough to be a secret."""
    if isinstance(options, str):
        if len(options) > 3:
            yield options
    elif isinstance(options, Mapping):
        for value in options.values():
            yield from texts(value)
    elif isinstance(options, list | tuple | set):
        for value in options:
            yield from texts(value)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error and what it came of: HTTP's file system calls all that fails `FileNotFoundError`."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def status(error: BaseException) -> int | None:
    """HTTP's status of an error, where it came with one."""
    for e in causes(error):
        response = getattr(e, "response", None)  # botocore's
        said = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, Mapping) else None
        numbers = (said, *(getattr(e, name, None) for name in ("status", "status_code")))
        if type(e).__module__.startswith("gcsfs"):  # aiohttp deprecates its own
            numbers = (*numbers, getattr(e, "code", None))
        found = next((number for number in numbers if isinstance(number, int) and 400 <= number < 600), None)
        if found is not None:
            return found
    return None


def passes(error: BaseException) -> bool:
    """Whether another try may do: the server is busy, or a connection broke."""
    number = status(error)
    if number is not None:
        return number in MOMENTARY
    names = {kind.__name__ for e in causes(error) for kind in type(e).__mro__}
    return bool(names & BROKEN) and not names & FINAL


def plain(error: Exception, url: str, options: Mapping[str, Any]) -> OSError:
    """Give an error of any library as an `OSError` of the kind that a disk would raise."""
    text, number = told(error, url, options), status(error)
    if isinstance(error, FileExistsError) or number == 412:
        return FileExistsError(text)
    if number in (401, 403) or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return PermissionError(f"no permission ({text}): check the credentials and storage_options")
    if number == 404 or (isinstance(error, FileNotFoundError) and number is None and not passes(error)):
        return FileNotFoundError(f"nothing is there ({text})")
    return OSError(f"{text}, after {PATIENCE:g} seconds of trying" if passes(error) else text)


def pauses() -> Iterator[float]:
    """Seconds to wait before each new try, twice as long each time and shortened by chance."""
    end, pause = time.monotonic() + PATIENCE, 0.25
    while time.monotonic() + pause < end:
        yield pause * random.uniform(0.5, 1)
        pause = min(2 * pause, 8)


def patiently(work: Callable[[], T], url: str, options: Mapping[str, Any]) -> T:
    """Do what may fail for the moment, again and again; raises a plain `OSError`."""
    waits = pauses()
    while True:
        try:
            return work()
        except Exception as e:  # of any library
            failure, wait = plain(e, url, options), next(waits, None) if passes(e) else None
        if wait is None:
            raise failure  # here, where it has no context: the error that it stands for may show a secret
        time.sleep(wait)


async def patiently_async(work: Callable[[], Awaitable[T]], url: str, options: Mapping[str, Any]) -> T:
    """Do the same on an event loop."""
    waits = pauses()
    while True:
        try:
            return await work()
        except Exception as e:
            failure, wait = plain(e, url, options), next(waits, None) if passes(e) else None
        if wait is None:
            raise failure
        await asyncio.sleep(wait)


def read_bytes(address: str | Path, storage_options: Mapping[str, Any] | None) -> bytes:
    """Read a whole file, of a path or a URL; raises `OSError`."""
    if not is_remote(address):
        return local_path(address).read_bytes()
    url = str(address)
    options = options_for(url, storage_options)
    fs, path = filesystem(url, options)
    return bytes(patiently(lambda: fs.cat_file(path), url, options))


def matching(pattern: str, storage_options: Mapping[str, Any] | None) -> list[str]:
    """Give the URLs that match a pattern, sorted, or the file of that very name; raises `OSError`."""
    options = options_for(pattern, storage_options)
    fs, path = filesystem(pattern, options)

    def listed() -> list[str]:
        if "*" not in path and fs.exists(path):
            return [pattern]
        return sorted(str(fs.unstrip_protocol(name)) for name in fs.glob(path))

    return patiently(listed, pattern, options)
