"""A NIXL backend plugin for AWS EFA and every other network that libfabric knows, and the ways to have NIXL find it.

vLLM and SGLang load :func:`activate` by themselves, as an entry point. Elsewhere::

    export NIXL_PLUGIN_DIR=$(python -m nixl_libfabric plugin-dir)      # for one program
    python -m nixl_libfabric enable                                    # for every program of this environment

or, in a program, before it makes its first agent: ``nixl_libfabric.activate()``.
"""

from nixl_libfabric.startup import activate

__all__ = ["activate", "plugin_dir"]


def plugin_dir():
    """The folder for NIXL_PLUGIN_DIR: this plugin and all others of the NIXL that `import nixl` takes. A str."""
    from nixl_libfabric import folder, nixl

    return folder.make(nixl.find(nixl.preferred()))
