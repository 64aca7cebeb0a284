"""Names that turn a call into arbitrary code, and classes that do not.

A gadget is a callable that runs a command, code or a pickle handed to it as data, or that leads to
one by name. No module pattern and no mark ever admits a gadget: only an exact pattern does, written
by an operator who means it. The whole standard library is reached by exact patterns only, so its
gadgets stand here for the sake of marks, of subclasses and of whoever reads a pattern list.
"""

from __future__ import annotations

import builtins
import sys
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum
from typing import Final, Generic, Protocol, cast

from pydantic import BaseModel, RootModel

#: Modules whose every callable is a gadget, with all below them.
GADGET_MODULES: Final = frozenset(
    {
        # The standard library: processes, code, imports, pickles, memory.
        "_aix_support", "_ctypes", "_imp", "_osx_support", "_pickle", "_posixsubprocess", "_pyrepl", "_winapi", "_xxsubinterpreters",
        "_interpreters", "antigravity", "asyncio.subprocess", "bdb", "cProfile", "cgitb", "cmd", "code", "codeop",
        "commands", "compileall", "copyreg", "ctypes", "dbm", "distutils", "doctest", "ensurepip", "idlelib", "imp", "importlib",
        "inspect", "lib2to3", "linecache", "marshal", "modulefinder", "msilib", "multiprocessing", "nt", "pdb", "pickle",
        "pickletools", "pkgutil", "popen2", "posix", "profile", "pstats", "pty", "py_compile", "pydoc", "runpy", "setuptools",
        "shelve", "site", "sitecustomize", "socketserver", "subprocess", "sys", "sysconfig", "this", "timeit", "trace", "tracemalloc",
        "turtledemo", "usercustomize", "venv", "webbrowser", "winreg", "xmlrpc", "zipapp", "zipimport",
        # Elsewhere: loaders and shells that scanners of pickles and templates know.
        "IPython", "celery.utils.imports", "cffi", "cloudpickle", "code_template", "dill", "django.core.cache.backends", "django.core.management",
        "django.utils.autoreload", "django.utils.module_loading", "fabric", "fsspec.utils", "hypothesis", "invoke", "jinja2", "joblib", "jsonpickle",
        "kombu.serialization", "lazy_loader", "mako", "nose", "numba", "numexpr", "numpy.distutils", "numpy.f2py", "numpy.testing",
        "paramiko", "paver", "pexpect", "pip", "pkg_resources", "plumbum", "ptyprocess", "py", "pytest", "_pytest", "rpyc", "sh",
        "stevedore", "sqlalchemy.ext.serializer", "tensorflow.keras.models", "torch.distributed", "torch.hub", "torch.jit", "torch.package", "torch.serialization",
        "torch.utils.cpp_extension", "uvicorn.importer", "werkzeug.debug", "werkzeug.utils", "yaml", "ruamel.yaml", "zope.dottedname",
        # Ourselves: a task must not reach the keys or the policy.
        "safedefer",
    }
)  # fmt: skip

#: Single gadgets, ``module:qualname`` or ``module:Class.member``.
GADGETS: Final = frozenset(
    {
        "builtins:__build_class__", "builtins:__import__", "builtins:breakpoint", "builtins:compile", "builtins:delattr", "builtins:eval",
        "builtins:exec", "builtins:exit", "builtins:getattr", "builtins:globals", "builtins:help", "builtins:input", "builtins:locals",
        "builtins:memoryview", "builtins:object", "builtins:open", "builtins:quit", "builtins:setattr", "builtins:super", "builtins:type",
        "builtins:vars", "builtins:str.format", "builtins:str.format_map", "builtins:filter", "builtins:map",
        "_functools:partial", "_functools:reduce", "functools:partial", "functools:partialmethod", "functools:reduce",
        "functools:singledispatch", "_operator:attrgetter", "_operator:itemgetter", "_operator:methodcaller", "_operator:call",
        "operator:attrgetter", "operator:methodcaller", "operator:call",
        "os:execl", "os:execle", "os:execlp", "os:execlpe", "os:execv", "os:execve", "os:execvp", "os:execvpe", "os:popen", "os:spawnl",
        "os:spawnle", "os:spawnlp", "os:spawnlpe", "os:spawnv", "os:spawnve", "os:spawnvp", "os:spawnvpe", "os:startfile", "os:system",
        "os:_execvpe", "os:_spawnvef", "os:fdopen", "os:removedirs", "os:renames", "shutil:rmtree", "shutil:move",
        "_io:FileIO", "_io:open", "_io:open_code", "io:open", "io:open_code", "asyncio.subprocess:create_subprocess_exec",
        "asyncio.subprocess:create_subprocess_shell", "asyncio.base_events:BaseEventLoop.subprocess_exec", "asyncio.base_events:BaseEventLoop.subprocess_shell",
        "collections:namedtuple", "_collections_abc:Callable", "dataclasses:make_dataclass", "enum:Enum", "logging.config:dictConfig",
        "logging.config:fileConfig", "logging.config:listen", "types:CodeType", "types:FunctionType", "types:MethodType", "types:new_class",
        "types:DynamicClassAttribute", "typing:get_type_hints", "typing:ForwardRef", "unittest.mock:patch", "unittest.mock:_importer",
        "unittest.loader:TestLoader", "unittest.main:TestProgram",
        "http.server:CGIHTTPRequestHandler", "imaplib:IMAP4_stream", "pipes:Template", "rlcompleter:Completer", "optparse:Values", "gettext:c2py",
        "gettext:GNUTranslations", "turtle:config_dict", "turtle:__forwardmethods", "turtle:_make_global_funcs", "platform:_Processor",
        "weakref:finalize", "atexit:register", "signal:signal", "signal:_signal", "threading:Thread", "_thread:start_new_thread",
        "_thread:start_new", "concurrent.futures.thread:ThreadPoolExecutor", "concurrent.futures.process:ProcessPoolExecutor", "contextlib:ExitStack",
        "sched:scheduler", "tkinter:Tcl", "_tkinter:create", "sqlite3:connect", "_sqlite3:connect", "uuid:_get_command_stdout", "platform:popen", "platform:_syscmd_ver",
        "platform:_syscmd_file", "ssl:get_server_certificate", "tempfile:mktemp", "test.support.script_helper:assert_python_ok", "mailcap:findmatch",
        "ctypes.util:find_library", "gc:get_objects", "gc:get_referrers", "gc:get_referents", "string:Formatter", "string:Template",
        "traceback:TracebackException",
        # Elsewhere.
        "numpy:load", "numpy:loadtxt", "numpy:fromfile", "numpy:genfromtxt", "numpy:frompyfunc", "numpy:vectorize", "numpy.lib.npyio:load",
        "numpy.lib._npyio_impl:load", "numpy:apply_along_axis", "numpy:apply_over_axes", "numpy:piecewise", "numpy:fromfunction",
        "pandas.io.pickle:read_pickle", "pandas:read_pickle", "pandas:eval", "pandas.core.computation.eval:eval", "pandas.core.frame:DataFrame.eval",
        "pandas.core.frame:DataFrame.query", "torch:load", "torch:compile", "sympy.core.sympify:sympify", "sympy.parsing.sympy_parser:parse_expr",
        "sympy.utilities.lambdify:lambdify", "scipy.io:loadmat", "sklearn.datasets:load_files", "keras.models:load_model", "lxml.etree:XSLT",
        "pydantic.main:BaseModel.parse_raw", "pydantic.main:BaseModel.parse_file", "pydantic.main:BaseModel.model_construct",
        "pydantic.main:create_model", "pydantic.deprecated.parse:load_str_bytes", "pydantic.deprecated.parse:load_file", "pydantic.deprecated.tools:parse_raw_as",
        "pydantic._internal._validators:import_string", "pydantic.types:ImportString", "sqlalchemy.util.langhelpers:import_", "flask.helpers:get_root_path",
        "flask.config:Config.from_pyfile", "flask.config:Config.from_object", "flask.config:Config.from_envvar", "aiohttp.web:run_app", "click.core:Command.main",
        "django.template.base:Template", "django.db.models.query:QuerySet.raw", "twisted.python.reflect:namedAny", "twisted.internet.utils:getProcessOutput",
        "google.appengine.ext.deferred.deferred:run", "google.appengine.ext.deferred.deferred:invoke_member", "google.appengine.ext.deferred.deferred:run_from_datastore",
    }
)  # fmt: skip

#: Built-in types that may be values of arguments (``defaultdict(list)``), though never callees.
HARMLESS_TYPES: Final[frozenset[type]] = frozenset(
    {bool, bytearray, bytes, complex, dict, float, frozenset, int, list, range, set, slice, str, tuple, type(None)}
)

#: Classes whose ``__init__`` and ``__new__`` an admitted class may inherit: they do nothing, or as much as their arguments
#: are long. ``list``, ``set``, ``tuple``, ``bytes`` and ``str`` are not here: they go through ``range(10**18)``, make 10**12 bytes, or
#: import the codec that they are told.
HARMLESS_BASES: Final[tuple[type, ...]] = (
    object, cast("type", Generic), cast("type", Protocol), BaseModel, RootModel, Enum, IntEnum, StrEnum, Flag, IntFlag,
    bool, complex, dict, float, int, BaseException, *(
        cls for cls in vars(builtins).values() if isinstance(cls, type) and issubclass(cls, BaseException)
    ),
)  # fmt: skip


def is_gadget(module: str, qualname: str) -> bool:
    """Whether a name is on the list: itself, the class that it is a member of, or its module."""
    if f"{module}:{qualname}" in GADGETS or f"{module}:{qualname.partition('.')[0]}" in GADGETS:
        return True
    while module:
        if module in GADGET_MODULES:
            return True
        module = module.rpartition(".")[0]
    return False


def is_standard_library(module: str) -> bool:
    """Whether a module belongs to Python itself."""
    return module.partition(".")[0] in sys.stdlib_module_names
