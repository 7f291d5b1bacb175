//! GPU memory lent to other processes and mapped from them, on two stand-in drivers, which are strangers to each other as two
//! processes are; and copies of many pieces by the kernel.

mod cuda_bed;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use cuda_bed::{Bed, Memory, bytes_at};
use nixl_libfabric::cuda::{Batch, Context, Handle, Lent, Mapping, Pinned, Span, Stream};
use nixl_libfabric::error::{Result, Status};

const MIB: usize = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(30);

fn fill(addr: u64, bytes: usize, value: u8) {
    // SAFETY: the stand-in's memory is host memory of that length.
    unsafe { std::ptr::write_bytes(addr as *mut u8, value, bytes) };
}

fn pattern(addr: u64, bytes: usize) -> Vec<u8> {
    let bytes: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8 ^ (at >> 12) as u8).collect();
    // SAFETY: as in `fill`.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), addr as *mut u8, bytes.len()) };
    bytes
}

fn context(bed: &Bed, device: u32) -> Context {
    bed.app_uses(device as i32);
    bed.cuda.active_context(device).unwrap().unwrap()
}

fn lend(bed: &Bed, addr: u64, bytes: usize) -> Result<Lent> {
    bed.cuda.lend(&bed.cuda.inspect(addr, bytes as u64)?)
}

/// What another process gets by `pidfd_getfd`.
fn files(handle: &Handle) -> Vec<OwnedFd> {
    let Handle::Files(files) = handle else { return Vec::new() };
    let copy = |fd: u32| {
        // SAFETY: the lender keeps it open.
        unsafe { BorrowedFd::borrow_raw(fd as i32) }.try_clone_to_owned().unwrap()
    };
    files.iter().map(|(fd, _)| copy(*fd)).collect()
}

fn open(context: &Context, lent: &Lent) -> Result<Arc<Mapping>> {
    let what = lent.shareable();
    Mapping::open(context, what, files(&what.handle)).map(Arc::new)
}

#[test]
fn an_allocation_is_lent_whole_and_reached_both_ways() {
    let (owner, other) = (Bed::new(), Bed::new());
    let ctx = owner.app_uses(0);
    let theirs = owner.memory(Memory::Device, 0, 2 * MIB, ctx);
    let bytes = pattern(theirs, 2 * MIB);
    let lent = lend(&owner, theirs + 100, MIB).unwrap();
    assert_eq!((lent.shareable().base, lent.shareable().size), (theirs, 2 * MIB as u64));
    let context = context(&other, 0);
    let mapping = open(&context, &lent).unwrap();
    assert_eq!(other.count("opened"), 1);

    let here = other.memory(Memory::Device, 0, MIB, other.app_uses(0));
    let stream = Stream::new(&context).unwrap();
    let far = mapping.span(theirs + 7, MIB as u64).unwrap();
    stream.copy_wait(other.span(here, MIB as u64), far.clone(), DEADLINE).unwrap();
    assert_eq!(bytes_at(here, MIB), bytes[7..7 + MIB]);
    fill(here, MIB, 0x5a);
    stream.copy_wait(far, other.span(here, MIB as u64), DEADLINE).unwrap();
    assert_eq!(bytes_at(theirs + 7, MIB), vec![0x5a; MIB]);
    assert_eq!(bytes_at(theirs, 7), bytes[..7]);

    drop(mapping);
    assert_eq!(other.count("opened"), 0);
    assert_eq!(other.thread_state(), (0, 0, 0));
    assert_eq!((owner.count("contexts_created"), other.count("contexts_created")), (0, 0));
}

#[test]
fn a_mapping_stays_while_copies_that_name_it_are_under_way() {
    let (owner, other) = (Bed::new(), Bed::new());
    let theirs = owner.memory(Memory::Device, 0, MIB, owner.app_uses(0));
    let context = context(&other, 0);
    let here = other.memory(Memory::Device, 0, MIB, other.app_uses(0));
    let bytes = pattern(here, MIB);
    let lent = lend(&owner, theirs, MIB).unwrap();
    let mapping = open(&context, &lent).unwrap();
    let stream = Stream::new(&context).unwrap();
    other.option("polls", 20);
    let far = mapping.span(theirs, MIB as u64).unwrap();
    let mut copy = stream.copy(far, other.span(here, MIB as u64)).unwrap();
    drop(mapping);
    assert!(!copy.is_done().unwrap());
    assert_eq!(other.count("opened"), 1);
    copy.wait(DEADLINE).unwrap();
    assert_eq!(other.count("opened"), 0);
    assert_eq!(bytes_at(theirs, MIB), bytes);
}

#[test]
fn memory_of_vmm_handles_is_lent_by_descriptors_if_it_may_be_exported() {
    let (owner, other) = (Bed::new(), Bed::new());
    owner.app_uses(0);
    let theirs = owner.map(Memory::Vmm, &[(MIB, 0), (2 * MIB, 0), (MIB, 0)], 0);
    let bytes = pattern(theirs, 4 * MIB);
    let lent = lend(&owner, theirs + MIB as u64 + 5, 2 * MIB).unwrap();
    // Only the handles that the range touches.
    let what = lent.shareable();
    assert_eq!((what.base, what.size), (theirs + MIB as u64, 3 * MIB as u64));
    assert!(matches!(&what.handle, Handle::Files(files) if files.len() == 2), "{:?}", what.handle);

    let context = context(&other, 0);
    let pieces = other.count("pieces");
    let mapping = open(&context, &lent).unwrap();
    let here = other.memory(Memory::Device, 0, 3 * MIB, other.app_uses(0));
    let stream = Stream::new(&context).unwrap();
    let far = mapping.span(what.base, what.size).unwrap();
    stream.copy_wait(other.span(here, what.size), far, DEADLINE).unwrap();
    assert_eq!(bytes_at(here, 3 * MIB), bytes[MIB..]);
    drop((mapping, lent));
    assert_eq!(other.count("pieces"), pieces + 1, "only the memory here is left");
    assert_eq!((owner.live().3, other.live().3), (0, 0));

    owner.option("exportable", 0);
    let secret = owner.map(Memory::Vmm, &[(MIB, 0)], 0);
    let error = lend(&owner, secret, MIB).unwrap_err();
    assert_eq!(error.status(), Status::NotSupported);
    assert!(error.to_string().contains("requestedHandleTypes"), "{error}");
}

#[test]
fn what_the_driver_does_not_export_is_refused_in_words() {
    let bed = Bed::new();
    bed.app_uses(0);
    let pool = bed.memory(Memory::Async, 0, MIB, 0);
    let error = lend(&bed, pool, MIB).unwrap_err();
    assert_eq!(error.status(), Status::NotSupported);
    assert!(error.to_string().contains("cudaMalloc"), "{error}");
    let many = bed.map(Memory::Vmm, &vec![(4096, 0); 600], 0);
    let error = lend(&bed, many, 600 * 4096).unwrap_err();
    assert!(error.to_string().contains("600 VMM handles"), "{error}");
    assert_eq!(bed.live().3, 0);
    // The process that has lent it opens it by its own address.
    let own = bed.memory(Memory::Device, 0, MIB, bed.app_uses(0));
    let lent = lend(&bed, own, MIB).unwrap();
    assert!(open(&context(&bed, 0), &lent).is_err());
}

#[test]
fn what_is_freed_and_allocated_at_the_same_address_is_another_allocation() {
    let bed = Bed::new();
    let ctx = bed.app_uses(0);
    let first = bed.memory(Memory::Device, 0, MIB, ctx);
    let id = lend(&bed, first, MIB).unwrap().shareable().id;
    assert_eq!(lend(&bed, first, 1).unwrap().shareable().id, id);
    let again = bed.again(first, MIB, ctx);
    assert_eq!(again, first);
    assert_ne!(lend(&bed, again, MIB).unwrap().shareable().id, id);
}

#[test]
fn a_lender_that_lies_about_its_memory_is_not_believed() {
    let (owner, other) = (Bed::new(), Bed::new());
    let theirs = owner.memory(Memory::Device, 0, MIB, owner.app_uses(0));
    let vmm = owner.map(Memory::Vmm, &[(MIB, 0), (MIB, 0)], 0);
    let context = context(&other, 0);
    let truth = lend(&owner, theirs, MIB).unwrap().shareable().clone();
    let pieces = other.count("pieces");
    for (base, size) in [(theirs, 2 * MIB as u64), (theirs, 0), (0, MIB as u64), (u64::MAX - 5, MIB as u64)] {
        let lie = nixl_libfabric::cuda::Shareable { base, size, ..truth.clone() };
        assert!(Mapping::open(&context, &lie, Vec::new()).is_err(), "{base:#x}+{size:#x}");
    }
    let lent = lend(&owner, vmm, 2 * MIB).unwrap();
    let truth = lent.shareable();
    let Handle::Files(numbers) = &truth.handle else { panic!("{truth:?}") };
    for sizes in [[MIB, 2 * MIB], [2 * MIB, MIB], [MIB, usize::MAX]] {
        let handle =
            Handle::Files(numbers.iter().zip(sizes).map(|((fd, _), size)| (*fd, size as u64)).collect());
        let size = sizes[0].wrapping_add(sizes[1]) as u64;
        let lie = nixl_libfabric::cuda::Shareable { size, handle, ..truth.clone() };
        assert!(Mapping::open(&context, &lie, files(&truth.handle)).is_err(), "{sizes:?}");
    }
    let few = Mapping::open(&context, truth, Vec::new()).unwrap_err();
    assert_eq!(few.status(), Status::InvalidParam);
    assert_eq!((other.count("opened"), other.count("pieces")), (0, pieces));
    let mapping = Arc::new(Mapping::open(&context, truth, files(&truth.handle)).unwrap());
    assert!(mapping.span(vmm, 2 * MIB as u64).is_ok());
    for (addr, len) in [(vmm, 2 * MIB as u64 + 1), (vmm - 1, 2), (vmm + 2 * MIB as u64, 1), (vmm, u64::MAX)] {
        assert_eq!(mapping.span(addr, len).unwrap_err().status(), Status::InvalidParam, "{addr:#x}+{len:#x}");
    }
}

/// Lends, maps, copies and ends.
fn whole_life(owner: &Bed, other: &Bed, context: &Context, addrs: (u64, u64), bytes: usize) -> Result<()> {
    let lent = lend(owner, addrs.0, bytes)?;
    let what = lent.shareable();
    let mapping = Arc::new(Mapping::open(context, what, files(&what.handle))?);
    let stream = Stream::new(context)?;
    let near = other.span(addrs.1, bytes as u64).with_kernels_of(context);
    let far = mapping.span(addrs.0, bytes as u64)?;
    let mut batch = Batch::default();
    for at in 0..16 {
        batch.add(&far, at * 1000, &near, at * 1000, 900)?;
    }
    let mut copy = stream.start(batch)?;
    while !copy.is_done()? {}
    Ok(())
}

#[test]
fn whatever_call_fails_nothing_stays_mapped_and_the_thread_is_as_it_was() {
    for kind in [Memory::Device, Memory::Vmm] {
        let (owner, other) = (Bed::new(), Bed::new());
        let context = context(&other, 1);
        let mine = other.app_uses(0);
        other.app_current(mine);
        let ctx = owner.app_uses(0);
        let theirs = match kind {
            Memory::Device => owner.memory(kind, 0, 2 * MIB, ctx),
            _ => owner.map(kind, &[(MIB, 0), (MIB, 0)], 0),
        };
        let here = other.memory(Memory::Device, 1, 2 * MIB, other.app_uses(1));
        let pieces = other.count("pieces");
        let start = other.count("calls");
        whole_life(&owner, &other, &context, (theirs, here), 2 * MIB).unwrap();
        let calls = other.count("calls") - start;
        assert_eq!(other.count("kernels"), 1);
        for nth in 1..=calls {
            other.take_log();
            other.fail("*", nth as i32, 999);
            let outcome = whole_life(&owner, &other, &context, (theirs, here), 2 * MIB);
            let log = other.take_log();
            other.fail("*", 0, 0);
            let failed = log[nth as usize - 1].split(' ').next().unwrap();
            let at = format!("{kind:?}: call {nth}, {failed}: {outcome:?}");
            assert_eq!(other.thread_state().0, mine, "{at}");
            let undoing = [
                "Release",
                "Destroy",
                "Free",
                "Pop",
                "GetCurrent",
                "SetCurrent",
                "Push",
                "Close",
                "Unmap",
                "Unload",
            ];
            if !undoing.iter().any(|call| failed.contains(call)) {
                assert_eq!((other.count("pieces"), other.count("opened")), (pieces, 0), "{at}");
                assert_eq!((other.live(), other.count("modules")), ((0, 0, 0, 0, 0), 0), "{at}");
            }
            assert_eq!(other.count("contexts_created"), 0, "{at}");
            other.reset_counts();
            other.app_current(mine);
            if other.count("pieces") != pieces || other.count("opened") != 0 {
                // What could not be undone is lost; the next round begins anew.
                other.forget_mappings(here);
            }
        }
        assert_eq!(owner.live(), (0, 0, 0, 0, 0));
    }
}

/// A GPU's memory in two areas, and a stream.
struct Copier {
    bed: Bed,
    context: Context,
    stream: Stream,
    from: u64,
    to: u64,
    bytes: Vec<u8>,
}

impl Copier {
    fn new(len: usize) -> Self {
        let bed = Bed::new();
        let context = context(&bed, 0);
        let ctx = bed.app_uses(0);
        let (from, to) = (bed.memory(Memory::Device, 0, len, ctx), bed.memory(Memory::Device, 0, len, ctx));
        let bytes = pattern(from, len);
        let stream = Stream::new(&context).unwrap();
        Self { bed, context, stream, from, to, bytes }
    }

    fn span(&self, addr: u64) -> Span {
        self.bed.span(addr, self.bytes.len() as u64).with_kernels_of(&self.context)
    }

    /// Copies these ranges (to, from, length), and checks every byte of the target.
    fn check(&self, pieces: &[(usize, usize, usize)]) {
        let len = self.bytes.len();
        fill(self.to, len, 0xee);
        let (to, from) = (self.span(self.to), self.span(self.from));
        let mut batch = Batch::with_capacity(pieces.len());
        let mut expected = vec![0xee; len];
        for &(there, here, len) in pieces {
            batch.add(&to, there as u64, &from, here as u64, len as u64).unwrap();
            expected[there..there + len].copy_from_slice(&self.bytes[here..here + len]);
        }
        self.stream.start(batch).unwrap().wait(DEADLINE).unwrap();
        assert!(bytes_at(self.to, len) == expected, "bytes differ");
        assert_eq!(self.bed.count("contexts_ruined"), 0);
    }
}

#[test]
fn many_small_pieces_are_one_launch() {
    let copier = Copier::new(8 * MIB);
    let pieces: Vec<_> = (0..4096).map(|i| ((i * 7 % 4096) * 2048, i * 2048, 2048)).collect();
    copier.bed.take_log();
    copier.check(&pieces);
    let log = copier.bed.take_log();
    let launches: Vec<_> = log.iter().filter(|line| line.starts_with("cuLaunchKernel")).collect();
    assert_eq!(launches, ["cuLaunchKernel primary0 blocks=4096"]);
    assert!(!log.iter().any(|line| line.starts_with("cuMemcpy")));
    // What is long, and few pieces, the driver copies.
    copier.check(&[(0, 0, 100), (200, 300, 1000), (5000, 4000, 3)]);
    assert_eq!(copier.bed.count("kernels"), 1);
    let mixed: Vec<_> =
        (0..8).map(|i| (i * 1000, i * 1000 + 13, 700)).chain([(2 * MIB, MIB, 5 * MIB)]).collect();
    copier.check(&mixed);
    assert_eq!(copier.bed.count("kernels"), 2);
    // Tables are used again.
    copier.bed.take_log();
    copier.check(&pieces);
    assert!(!copier.bed.take_log().iter().any(|line| line.starts_with("cuMemHostAlloc")));
    let Copier { bed, context, stream, .. } = copier;
    drop((stream, context));
    assert_eq!((bed.live(), bed.count("modules")), ((0, 0, 0, 0, 0), 0));
}

#[test]
fn more_pieces_than_a_table_holds_take_several_launches() {
    let copier = Copier::new(8 * MIB);
    // 40,000 pieces of one unit each, and one of many.
    let pieces: Vec<_> =
        (0..40_000).map(|i| (i * 100, i * 101, 99)).chain([(4 * MIB + 1, 4 * MIB + 3, 3 * MIB)]).collect();
    copier.check(&pieces);
    assert_eq!(copier.bed.count("kernels"), 3);
}

#[test]
fn kernels_touch_only_what_they_reach() {
    let copier = Copier::new(MIB);
    let bed = &copier.bed;
    let far = bed.memory(Memory::Device, 1, MIB, bed.app_uses(1));
    let on_other = bed.span(far, MIB as u64).with_kernels_of(&context(bed, 1));
    let unknown = bed.span(copier.to, MIB as u64);
    let pinned = Pinned::new(&copier.context, MIB).unwrap();
    for to in [on_other, unknown, pinned.span()] {
        let mut batch = Batch::default();
        for at in 0..64 {
            batch.add(&to, at * 1024, &copier.span(copier.from), at * 1024, 512).unwrap();
        }
        copier.stream.start(batch).unwrap().wait(DEADLINE).unwrap();
    }
    assert_eq!((bed.count("kernels"), bed.count("contexts_ruined")), (0, 0));
    assert_eq!(bytes_at(far, 512), copier.bytes[..512]);

    let reached = |addr: u64| bed.cuda.kernels_reach(&bed.cuda.inspect(addr, 100).unwrap());
    assert!(reached(copier.from));
    assert!(reached(bed.memory(Memory::Async, 0, MIB, 0)));
    assert!(reached(bed.memory(Memory::Vmm, 0, MIB, 0)));
    let ctx = bed.app_uses(0);
    for kind in [Memory::Imported, Memory::Managed, Memory::Host] {
        assert!(!reached(bed.memory(kind, 0, MIB, ctx)), "{kind:?}");
    }
    bed.fail("cuMemGetAccess", 1, 801);
    assert!(!reached(bed.memory(Memory::Vmm, 0, MIB, 0)));
}

#[test]
fn without_a_kernel_pieces_are_copied_one_by_one() {
    let pieces: Vec<_> = (0..100).map(|i| (i * 100, i * 100, 77)).collect();
    let copier = Copier::new(MIB);
    copier.bed.option("jit", 0);
    copier.check(&pieces);
    assert_eq!(copier.bed.count("kernels"), 0);

    let copier = Copier::new(MIB);
    copier.bed.fail("cuLaunchKernel", 1, 701);
    copier.check(&pieces);
    copier.bed.fail("", 0, 0);
    // What could not be launched once is not tried again.
    copier.check(&pieces);
    assert_eq!(copier.bed.count("kernels"), 0);
}
