//! Which mapping serves which memory of a process: pure bookkeeping, of whatever a context and a mapping are.

use std::sync::Arc;

use crate::error::{Error, Result, Status};
use crate::wire::{BoardEntry, Shareable};

/// Mappings of one process' memory. When there are so many, the one that was not used for longest ends.
pub const MAPPINGS_MAX: usize = 1024;

/// A region, and the nonce of the board on which it stands.
pub(super) type Place = ([u8; 16], BoardEntry);

/// Mappings by what they are of.
pub(super) struct Cache<C, M> {
    known: Vec<Known<C, M>>,
    /// Counts uses.
    clock: u64,
}

struct Known<C, M> {
    what: Arc<Shareable>,
    context: C,
    mapping: Arc<M>,
    /// Regions that are reached by it.
    regions: Vec<Place>,
    /// When it was last used, by the clock.
    used: u64,
}

impl<C: PartialEq, M> Known<C, M> {
    /// Whether copies under way name it.
    fn is_used(&self) -> bool {
        Arc::strong_count(&self.mapping) > 1
    }

    /// Whether this is the allocation, mapped for the context. A handle alone does not tell: the driver gives the same again for
    /// memory that was freed and allocated at the same address.
    fn is(&self, what: &Shareable, context: &C) -> bool {
        *self.what == *what && self.context == *context
    }

    /// Whether the driver could take the one for the other.
    fn hides(&self, what: &Shareable, context: &C) -> bool {
        let overlap = self.what.base < what.base.saturating_add(what.size)
            && what.base < self.what.base.saturating_add(self.what.size);
        self.context == *context && overlap
    }
}

impl<C, M> Default for Cache<C, M> {
    fn default() -> Self {
        Self { known: Vec::new(), clock: 0 }
    }
}

impl<C: PartialEq + Clone, M> Cache<C, M> {
    /// The mapping of an allocation, which `open` makes if there is none. Before it does, what is for no region any more of which
    /// `is_wanted` holds ends: the driver maps small allocations by the block that they share.
    pub fn get(
        &mut self,
        region: Place,
        what: &Arc<Shareable>,
        context: &C,
        is_wanted: impl Fn(&Place) -> bool,
        open: impl FnOnce() -> Result<M>,
    ) -> Result<Arc<M>> {
        self.clock += 1;
        let now = self.clock;
        if let Some(known) = self.known.iter_mut().find(|known| known.is(what, context)) {
            known.used = now;
            if !known.regions.contains(&region) {
                known.regions.push(region);
            }
            return Ok(Arc::clone(&known.mapping));
        }
        self.retain(is_wanted);
        // What was mapped there before is another allocation's, or another part of this one: it has to go first.
        if self.known.iter().any(|known| known.hides(what, context) && known.is_used()) {
            return Err(Error::new(
                Status::NotAllowed,
                "other memory, that was mapped at its address in that process, is still being copied",
            ));
        }
        self.known.retain(|known| !known.hides(what, context));
        if self.known.len() >= MAPPINGS_MAX {
            let idle = self.known.iter().enumerate().filter(|(_, known)| !known.is_used());
            let oldest = idle.min_by_key(|(_, known)| known.used).map(|(at, _)| at);
            let oldest =
                oldest.ok_or_else(|| Error::not_supported(format!("{MAPPINGS_MAX} mappings are in use")))?;
            self.known.swap_remove(oldest);
        }
        let (mapping, context) = (Arc::new(open()?), context.clone());
        let known = Known {
            what: Arc::clone(what),
            context,
            mapping: Arc::clone(&mapping),
            regions: vec![region],
            used: now,
        };
        self.known.push(known);
        Ok(mapping)
    }

    /// Ends what is for no region any more of which `is_wanted` holds; returns how many. What is being copied stays: it goes another
    /// time.
    pub fn retain(&mut self, is_wanted: impl Fn(&Place) -> bool) -> usize {
        let before = self.known.len();
        self.known.retain_mut(|known| {
            known.regions.retain(&is_wanted);
            !known.regions.is_empty() || known.is_used()
        });
        before - self.known.len()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;
    use crate::wire::gpu::Handle;

    /// A driver that returns what is mapped already when it is given a handle again, whatever that stands for by now.
    #[derive(Default, Clone)]
    struct Driver(Rc<RefCell<Vec<(u64, u64, usize)>>>);

    /// Which allocation one really reaches.
    struct Mapped {
        driver: Driver,
        base: u64,
        id: u64,
    }

    impl Driver {
        fn open(&self, what: &Shareable) -> Mapped {
            let mut open = self.0.borrow_mut();
            let at = open.iter().position(|(base, ..)| *base == what.base).unwrap_or_else(|| {
                open.push((what.base, what.id, 0));
                open.len() - 1
            });
            open[at].2 += 1;
            Mapped { driver: self.clone(), base: what.base, id: open[at].1 }
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            let mut open = self.driver.0.borrow_mut();
            open.iter_mut().filter(|(base, ..)| *base == self.base).for_each(|(.., count)| *count -= 1);
            open.retain(|(.., count)| *count > 0);
        }
    }

    fn memory(base: u64, size: u64, id: u64) -> Arc<Shareable> {
        Arc::new(Shareable { base, size, id, handle: Handle::Ipc([base as u8; 64]) })
    }

    fn place(number: u32) -> Place {
        ([1; 16], BoardEntry { number, generation: 1 })
    }

    fn get(
        cache: &mut Cache<u32, Mapped>,
        driver: &Driver,
        region: u32,
        what: &Arc<Shareable>,
    ) -> Result<Arc<Mapped>> {
        cache.get(place(region), what, &0, |_| true, || Ok(driver.open(what)))
    }

    #[test]
    fn memory_is_mapped_once_whatever_regions_lie_in_it() {
        let (mut cache, driver) = (Cache::default(), Driver::default());
        let what = memory(100, 10, 1);
        let first = get(&mut cache, &driver, 1, &what).unwrap();
        assert!(Arc::ptr_eq(&first, &get(&mut cache, &driver, 2, &memory(100, 10, 1)).unwrap()));
        drop(first);
        assert_eq!(cache.retain(|at| *at != place(1)), 0);
        assert_eq!(cache.retain(|at| *at != place(2)), 1);
        assert!(driver.0.borrow().is_empty());
    }

    #[test]
    fn freed_memory_is_never_taken_for_what_is_at_its_address_now() {
        let (mut cache, driver) = (Cache::default(), Driver::default());
        assert_eq!(get(&mut cache, &driver, 1, &memory(100, 10, 1)).unwrap().id, 1);
        assert_eq!(get(&mut cache, &driver, 2, &memory(100, 10, 2)).unwrap().id, 2);
        // Larger, smaller, and of another beginning.
        assert_eq!(get(&mut cache, &driver, 3, &memory(90, 20, 3)).unwrap().id, 3);
        assert_eq!(get(&mut cache, &driver, 4, &memory(95, 2, 4)).unwrap().id, 4);
        assert_eq!(driver.0.borrow().len(), 1);
        // Beside it, and for another context.
        get(&mut cache, &driver, 5, &memory(97, 3, 5)).unwrap();
        let what = memory(95, 2, 6);
        cache.get(place(6), &what, &1, |_| true, || Ok(driver.open(&what))).unwrap();
        assert_eq!(cache.known.len(), 3);
    }

    #[test]
    fn while_the_former_is_copied_the_new_one_is_refused() {
        let (mut cache, driver) = (Cache::default(), Driver::default());
        let former = get(&mut cache, &driver, 1, &memory(100, 10, 1)).unwrap();
        let refused = get(&mut cache, &driver, 2, &memory(100, 10, 2));
        assert_eq!(refused.err().unwrap().status(), Status::NotAllowed);
        // Nor is it forgotten, though nobody wants it.
        assert_eq!(cache.retain(|_| false), 0);
        assert!(get(&mut cache, &driver, 2, &memory(100, 10, 2)).is_err());
        drop(former);
        assert_eq!(get(&mut cache, &driver, 2, &memory(100, 10, 2)).unwrap().id, 2);
    }

    #[test]
    fn what_no_region_wants_ends_before_something_is_mapped() {
        let (mut cache, driver) = (Cache::default(), Driver::default());
        get(&mut cache, &driver, 1, &memory(100, 10, 1)).unwrap();
        let what = memory(200, 10, 2);
        let open = || {
            assert!(driver.0.borrow().is_empty(), "the former is still mapped");
            Ok(driver.open(&what))
        };
        cache.get(place(2), &what, &0, |at| *at != place(1), open).unwrap();
        assert_eq!(cache.known.len(), 1);
    }

    #[test]
    fn the_one_that_was_not_used_for_longest_makes_room() {
        let (mut cache, driver) = (Cache::default(), Driver::default());
        let all: Vec<_> = (0..MAPPINGS_MAX as u64).map(|i| memory(100 * (i + 1), 10, i)).collect();
        for what in &all {
            get(&mut cache, &driver, 1, what).unwrap();
        }
        let held = get(&mut cache, &driver, 1, &all[0]).unwrap();
        get(&mut cache, &driver, 1, &memory(1, 1, 9999)).unwrap();
        assert_eq!(cache.known.len(), MAPPINGS_MAX);
        assert!(!cache.known.iter().any(|known| known.what.base == all[1].base));
        let copied: Vec<_> = cache.known.iter().map(|known| Arc::clone(&known.mapping)).collect();
        assert!(get(&mut cache, &driver, 1, &memory(3, 1, 10_000)).is_err());
        drop((copied, held));
        assert!(get(&mut cache, &driver, 1, &memory(3, 1, 10_000)).is_ok());
    }

    #[test]
    fn what_cannot_be_opened_is_not_known() {
        let mut cache = Cache::<u32, Mapped>::default();
        let failed = cache.get(place(1), &memory(1, 1, 1), &0, |_| true, || Err(Error::backend("no")));
        assert!(failed.is_err() && cache.is_empty());
    }
}
