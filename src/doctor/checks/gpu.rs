//! GPU memory: driver, runtime library, the ways to register it, and the devices that serve each GPU.

use super::few;
use crate::doctor::facts::{Cuda, Facts};
use crate::doctor::finding::Finding;
use crate::engine::is_software;
use crate::fabric::efa;

/// First libfabric, as major and minor number, that registers memory by dmabuf.
const DMABUF_SINCE: (u32, u32) = (1, 20);

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![topology(facts)];
    match &facts.cuda {
        None => findings.push(Finding::skip("gpu-driver", "no accelerator is seen here: host memory only")),
        Some(Err(reason)) => findings.push(Finding::fail(
            "gpu-driver",
            reason.clone(),
            "in a container the NVIDIA runtime brings the driver's library (--gpus, or the resource nvidia.com/gpu); compare with \
             `nvidia-smi`",
        )),
        Some(Ok(cuda)) => {
            let gpus = cuda.gpus.len();
            findings.push(Finding::ok("gpu-driver", format!("CUDA {}, {gpus} GPU{}", cuda.driver, if gpus == 1 { "" } else { "s" })));
            findings.push(memory(facts, cuda));
            findings.push(map(facts, cuda));
        }
    }
    findings
}

fn topology(facts: &Facts) -> Finding {
    if facts.machine.starts_with("hwloc ") {
        return Finding::ok("topology", format!("read by {}", facts.machine));
    }
    Finding::warn(
        "topology",
        format!("read from {}", facts.machine),
        "install hwloc's library (Debian and Ubuntu: libhwloc15): the kernel's files say less of bridges and of their speed",
    )
}

/// Whether libfabric and the kernel let a NIC reach GPU memory.
fn memory(facts: &Facts, cuda: &Cuda) -> Finding {
    let Some(Ok(loaded)) = &facts.libfabric else {
        return Finding::skip("gpu-memory", "without libfabric there is nothing to ask");
    };
    let by_dmabuf = cuda.gpus.iter().all(|(_, dmabuf, _)| *dmabuf) && loaded.version >= DMABUF_SINCE;
    let efa = loaded.offers.iter().any(|(provider, _)| efa::is_efa(provider));
    // Software providers say that they take it whatever libfabric was built with, and shm reaches no other host.
    let takes = |(provider, _): &&(String, String)| efa::is_efa(provider) || (!efa && !is_software(provider));
    if !loaded.accelerator_offers.iter().any(|offer| takes(&offer)) {
        let runtime = facts.cudart.as_ref().map(|reason| {
            format!(
                " It opens libcudart.so, without a version, and that is not found here ({reason}): put a link of that name to \
                 libcudart.so.12 or .13 into LD_LIBRARY_PATH."
            )
        });
        return Finding::warn(
            "gpu-memory",
            "libfabric offers no device that takes GPU memory (FI_HMEM)",
            format!(
                "libfabric must be built with CUDA, as the EFA installer's is.{} tcp takes none at all: there the option \
                 vram_staging moves it through host memory",
                runtime.unwrap_or_default()
            ),
        );
    }
    match (by_dmabuf, facts.peer_memory) {
        (true, _) => Finding::ok("gpu-memory", "registered by dmabuf"),
        (false, true) => Finding::ok("gpu-memory", "registered by address: a peer memory module is loaded"),
        (false, false) if efa => Finding::fail(
            "gpu-memory",
            "neither dmabuf nor a peer memory module: the NIC cannot reach GPU memory",
            "dmabuf wants Linux 5.12, NVIDIA's open kernel modules and libfabric 1.20; else `modprobe nvidia_peermem` on the host",
        ),
        (false, false) => Finding::warn(
            "gpu-memory",
            "neither dmabuf nor a peer memory module is seen",
            "the provider may copy GPU memory through the host: `modprobe nvidia_peermem` on the host, or a kernel and driver with dmabuf",
        ),
    }
}

fn map(facts: &Facts, cuda: &Cuda) -> Finding {
    let seen = |pci: &str| {
        facts.gpu_map.iter().find(|(known, _)| known == pci).map(|(_, devices)| devices.as_slice())
    };
    let lonely: Vec<&str> = cuda
        .gpus
        .iter()
        .map(|(pci, ..)| pci.as_str())
        .filter(|pci| seen(pci).is_none_or(<[String]>::is_empty))
        .collect();
    if !lonely.is_empty() {
        return Finding::warn(
            "gpu-nic-map",
            format!("no network device is known to be near {}", few(lonely)),
            "`nixl-libfabric topology` shows what is seen; the option gpu_devices names devices for a GPU",
        );
    }
    let rows = cuda.gpus.iter().map(|(pci, ..)| format!("{pci}: {}", few(seen(pci).unwrap_or_default())));
    Finding::ok("gpu-nic-map", rows.collect::<Vec<_>>().join("; "))
}
