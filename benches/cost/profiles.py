"""Reads what callgrind wrote: instructions by function, and what a library did for whoever called it."""

import re
from collections import Counter
from dataclasses import dataclass, field

# How objects are told apart, by file name; the first that matches. What is none of these is the plugin's helper: the libraries
# of the NIXL wheel that the C++ plugin links.
KINDS = [
    ("plugin", re.compile(r"/libplugin_[^/]*$")),
    ("driver", re.compile(r"/cost-driver$|\(below main\)|^$")),
    ("libfabric", re.compile(r"/libfabric\.so|/libfabric/[^/]*\.so|/lib(efa|ibverbs|softefa)[^/]*\.so")),
    ("system", re.compile(r"/(libc|libm|libstdc\+\+|libgcc_s|ld-linux[^/]*|libpthread|libdl|librt|vgpreload[^/]*)[.-][^/]*$")),
]
_NAME = re.compile(r"(\w+)=\((\d+)\)(?: (.*))?$")


def kind(path):
    return next((name for name, pattern in KINDS if pattern.search(path)), "plugin")


@dataclass
class Profile:
    """One phase, or the sum of some."""

    # Self cost by (kind of object, function).
    functions: Counter = field(default_factory=Counter)
    # What calls cost with all that they called, by (kind of the caller, kind of the callee, callee).
    calls: Counter = field(default_factory=Counter)

    def __add__(self, other):
        return Profile(self.functions + other.functions, self.calls + other.calls)

    def called(self, caller, callee):
        return {name: cost for (one, other, name), cost in self.calls.items() if (one, other) == (caller, callee)}

    def parts(self):
        """Instructions of the plugin, of the C and C++ libraries for it, of libfabric and all that it calls."""
        own = Counter()
        for (owner, _), cost in self.functions.items():
            own[owner] += cost
        for_plugin = sum(self.called("plugin", "system").values())
        rest = own["system"] - for_plugin - sum(self.called("driver", "system").values())
        return {"plugin": own["plugin"], "libraries": for_plugin, "libfabric": own["libfabric"] + rest}


def read(path):
    """The label of the file, and its profile."""
    label, objects, names = "", {}, {}
    here = function = callee_object = callee = None
    profile, inclusive, expected = Profile(), False, 0

    def name(table, number, text):
        if text is not None:
            table[number] = text
        return table[number]

    with open(path) as lines:
        for line in lines:
            line = line.rstrip("\n")
            if line.startswith("desc: Trigger: Client Request: "):
                label = line.removeprefix("desc: Trigger: Client Request: ")
            elif found := _NAME.match(line):
                key, number, text = found.groups()
                if key == "ob":
                    here = kind(name(objects, number, text))
                elif key == "cob":
                    callee_object = kind(name(objects, number, text))
                elif key == "fn":
                    function = name(names, number, text)
                elif key == "cfn":
                    callee = name(names, number, text)
            elif line.startswith("totals:"):
                expected = int(line.split()[1])
            elif line.startswith("calls="):
                inclusive = True
            elif line[:1].isdigit() or line.startswith(("+", "-", "*")):
                cost = int(line.split()[1])
                if inclusive:
                    profile.calls[here, callee_object or here, callee] += cost
                    inclusive, callee_object = False, None
                else:
                    profile.functions[here, function] += cost
    if (read_off := sum(profile.functions.values())) != expected:
        raise ValueError(f"{path}: {read_off} instructions read, callgrind counted {expected}")
    return label, profile
