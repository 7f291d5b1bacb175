//! A transfer request: prepared once, posted any number of times.
//!
//! What prepXfer allocates, postXfer reuses. A post has parts (one piece of work for each set of lanes, and the
//! notification) and is over when none is left. Rails hold the work of a post for as long as anything of it is in
//! flight, so a host that releases a request early only lets go of its own share.
//!
//! What moves without a NIC is one part more ([`CopyWork`]).
//!
//! A request knows nothing of peers. When a part is over it says what is to be done next.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::copies::{Copies, CopyList, CopyWork};
use super::plan::{self, Lane};
use super::state::PostState;
use crate::error::{Error, Result, Status};
use crate::fabric::RmaList;
use crate::memory::{RegionUser, Registration, begin_uses};
use crate::rail::{Destination, Event, Invitation, Rail, Tag, Work};
use crate::types::{Op, RailId};

/// Operations that go over the same lanes.
pub struct Part {
    /// The lanes, in the order of the list's.
    pub lanes: Vec<Lane>,
    /// The operations; not empty.
    pub list: Arc<RmaList>,
}

/// A prepared transfer with one peer, or with the agent itself.
pub struct Transfer {
    op: Op,
    bytes: u64,
    lanes: Vec<Lanes>,
    /// The list of each set of lanes; none once one of the local ranges is deregistered.
    lists: Mutex<Vec<Arc<RmaList>>>,
    /// What is copied.
    copies: Option<Arc<CopyList>>,
    /// Local registrations in use.
    registrations: Vec<Arc<Registration>>,
    state: PostState,
    /// Parts of this post that are not over.
    parts: AtomicU32,
    post: Mutex<Post>,
}

/// A set of lanes, and which of them the last post took: the first one in the upper half, how many in the lower.
struct Lanes {
    all: Vec<Lane>,
    invited: AtomicU64,
}

/// What belongs to one post of the request.
#[derive(Default)]
struct Post {
    /// Sent when the data has arrived.
    notification: Option<Vec<u8>>,
    works: Vec<Arc<Work>>,
    copying: Option<Arc<CopyWork>>,
    failed_at: Option<Instant>,
    posted_at: Option<Instant>,
}

/// What is to be done when a part of a post is over.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Other parts are not over.
    Nothing,
    /// Send this; the message is one more part.
    Notify(Vec<u8>),
    /// The post is over.
    Ended {
        /// How long it took, or what the host is told.
        outcome: std::result::Result<Duration, Status>,
        /// Bytes of its notification, if that will not be sent.
        unsent: Option<usize>,
    },
}

impl Transfer {
    /// A request that was never posted, of what NICs move and of what is copied.
    pub fn new(
        op: Op,
        parts: Vec<Part>,
        copies: Option<CopyList>,
        registrations: Vec<Arc<Registration>>,
    ) -> Arc<Self> {
        let bytes =
            parts.iter().map(|part| part.list.bytes()).chain(copies.as_ref().map(CopyList::bytes)).sum();
        let (lanes, lists) = parts
            .into_iter()
            .map(|part| (Lanes { all: part.lanes, invited: AtomicU64::new(0) }, part.list))
            .unzip();
        let transfer = Arc::new(Self {
            op,
            bytes,
            lanes,
            lists: Mutex::new(lists),
            copies: copies.map(Arc::new),
            registrations,
            state: PostState::default(),
            parts: AtomicU32::new(0),
            post: Mutex::default(),
        });
        for registration in &transfer.registrations {
            let user: Arc<dyn RegionUser> = Arc::clone(&transfer) as _;
            registration.add_user(Arc::downgrade(&user));
        }
        transfer
    }

    /// Direction.
    pub fn op(&self) -> Op {
        self.op
    }

    /// Bytes moved by one post.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is copied, and no NIC moves it.
    pub fn is_copied(&self) -> bool {
        self.copies.is_some()
    }

    /// Whether the last post is over.
    pub fn is_over(&self) -> bool {
        !self.state.is_in_flight()
    }

    /// Begins a post: from here on it is in flight, whatever becomes of it. The poster is a part of its own, so that
    /// it cannot be over before all of it was handed out; see [`part_over`](Self::part_over).
    pub fn begin(&self, notification: Option<Vec<u8>>) -> Result<()> {
        self.state.check_postable()?;
        begin_uses(self.registrations.iter()).map_err(|gone| {
            Error::not_found(format!("a local region of the transfer was deregistered: {gone}"))
        })?;
        *self.lock() = Post { notification, posted_at: Some(Instant::now()), ..Post::default() };
        self.parts.store(1, Ordering::Relaxed);
        self.state.begin();
        Ok(())
    }

    /// Leaves what is to be copied with `copies`, and invites rails to the other work of a post: as many as it deserves,
    /// beginning at a place that `turn` decides. `tag` comes back when a part of it is over. `way` tells where a lane leads,
    /// if it can be used, `prefer` whether it should be. False if there is work that no lane can be used for.
    #[must_use]
    pub fn launch(
        &self,
        tag: &Tag,
        turn: usize,
        rails: &[Arc<Rail>],
        copies: &Copies,
        way: impl Fn(Lane) -> Option<Destination>,
        prefer: impl Fn(Lane) -> bool,
    ) -> bool {
        // While the post is in use of its registrations, their regions stay.
        let lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let works: Vec<_> = lists.into_iter().map(|list| Work::new(self.op, list, Arc::clone(tag))).collect();
        let copying = self.copies.as_ref().map(|list| CopyWork::new(Arc::clone(list), Arc::clone(tag)));
        {
            // Under the lock: who fails the post stops all of it, or comes before and nothing is begun.
            let mut post = self.lock();
            if self.state.is_stopped() {
                return true;
            }
            self.parts.fetch_add((works.len() + usize::from(copying.is_some())) as u32, Ordering::Relaxed);
            post.works.clone_from(&works);
            post.copying.clone_from(&copying);
        }
        copying.inspect(|work| copies.push(Arc::clone(work)));
        self.lanes.iter().zip(works).all(|(lanes, work)| {
            let count = plan::rails_worth(work.len() as usize, work.bytes(), lanes.all.len());
            let first = turn % lanes.all.len();
            lanes.invite(&work, first, count, rails, |_, lane| way(lane).filter(|_| prefer(lane)))
                || lanes.invite(&work, first, count, rails, |_, lane| way(lane))
        })
    }

    /// Invites other lanes to work that one has left, as [`launch`](Self::launch) does. False if none is left, or those that
    /// did not reach the peer say that none will.
    #[must_use]
    pub fn go_on(
        &self,
        work: &Arc<Work>,
        rails: &[Arc<Rail>],
        way: impl Fn(Lane) -> Option<Destination>,
        prefer: impl Fn(Lane) -> bool,
    ) -> bool {
        let Some(lanes) = self.lanes_of(work).filter(|_| work.wants_rails()) else { return true };
        let lost: Vec<Lane> = work.lost().iter().map(|(index, _)| lanes.all[*index as usize]).collect();
        let way = |index, lane| way(lane).filter(|_| !work.was_left_by(index) && plan::may_lead(&lost, lane));
        // One that has nothing in common with those.
        let is_fresh = |lane: Lane| {
            prefer(lane) && !lost.iter().any(|lost| lost.rail == lane.rail || lost.endpoint == lane.endpoint)
        };
        let count = lanes.all.len();
        lanes.invite(work, 0, count, rails, |index, lane| way(index, lane).filter(|_| is_fresh(lane)))
            || lanes.invite(work, 0, count, rails, way)
    }

    /// Invites all other lanes to work of which one waits for its peer's first answer.
    pub fn widen(
        &self,
        work: &Arc<Work>,
        rails: &[Arc<Rail>],
        way: impl Fn(Lane) -> Option<Destination>,
        prefer: impl Fn(Lane) -> bool,
    ) {
        let Some(lanes) = self.lanes_of(work).filter(|_| work.wants_rails()) else { return };
        let invited: Vec<usize> = lanes.invited().map(|(index, _)| index).collect();
        lanes.invite(work, 0, lanes.all.len(), rails, |index, lane| {
            way(lane).filter(|_| prefer(lane) && !invited.contains(&usize::from(index)))
        });
    }

    /// The lanes that were of no use for work that others have done, with the reason.
    pub fn useless(&self, work: &Arc<Work>) -> Vec<(Lane, Error)> {
        let lost = work.useless();
        if lost.is_empty() {
            return Vec::new();
        }
        let Some(lanes) = self.lanes_of(work) else { return Vec::new() };
        lost.into_iter().map(|(index, why)| (lanes.all[index as usize], why)).collect()
    }

    /// The lanes of a piece of work, if it is of the last post.
    fn lanes_of(&self, work: &Arc<Work>) -> Option<&Lanes> {
        let set = self.lock().works.iter().position(|known| Arc::ptr_eq(known, work))?;
        Some(&self.lanes[set])
    }

    /// The rails that the last post took.
    pub fn rails(&self) -> impl Iterator<Item = RailId> + '_ {
        self.lanes.iter().flat_map(|lanes| lanes.invited().map(|(_, lane)| lane.rail))
    }

    /// Keeps the first error; what is not posted yet stays so. Appends the end of work that this was the end of.
    pub fn fail(&self, error: Error, events: &mut Vec<Event>) {
        let works = {
            let mut post = self.lock();
            if self.state.fail(error) {
                post.failed_at = Some(Instant::now());
            }
            post.copying.as_ref().inspect(|work| work.stop());
            post.works.clone()
        };
        events.extend(works.into_iter().filter(|work| work.stop()).map(|work| Event::WorkOver { work }));
    }

    /// One part is over.
    pub fn part_over(&self) -> Next {
        if self.parts.fetch_sub(1, Ordering::AcqRel) > 1 {
            return Next::Nothing;
        }
        // Errors are recorded under this lock: what is decided here is what the host is told.
        let mut post = self.lock();
        post.works.clear();
        post.copying = None;
        let failure = self.state.failure();
        let outcome = match &failure {
            Some(error) => Err(error.status()),
            None => match post.notification.take() {
                Some(message) => {
                    self.parts.store(1, Ordering::Relaxed);
                    return Next::Notify(message);
                }
                None => Ok(post.posted_at.map_or(Duration::ZERO, |at| at.elapsed())),
            },
        };
        let unsent = post.notification.take().map(|message| message.len());
        drop(post);
        for registration in &self.registrations {
            registration.end_use();
        }
        self.state.end(failure);
        Next::Ended { outcome, unsent }
    }

    /// What checkXfer answers. A failed post is reported when nothing of it is in flight any more, or when
    /// `drain_timeout` has passed since it failed.
    pub fn status(&self, drain_timeout: Duration) -> Result<Status> {
        let status = self.state.status()?;
        if status == Status::InProgress && self.state.is_stopped() {
            let failed_at = self.lock().failed_at;
            if failed_at.is_some_and(|at| at.elapsed() > drain_timeout) {
                return Err(self.state.error());
            }
        }
        Ok(status)
    }

    /// How long the post is in flight, if nothing has failed.
    pub fn elapsed(&self) -> Option<Duration> {
        if self.state.is_stopped() { None } else { self.lock().posted_at.map(|at| at.elapsed()) }
    }

    /// The host lets go of the request. In flight, it lives on in the rails until its last completion.
    pub fn release(&self, events: &mut Vec<Event>) {
        self.state.stop();
        if self.state.is_in_flight() {
            self.fail(Error::new(Status::Canceled, "the transfer was released in flight"), events);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Post> {
        // Every update of the post is a plain store: a panic elsewhere leaves nothing half done.
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lanes {
    /// Invites `count` lanes, from `first` on, that can be used. Whether there was one.
    fn invite(
        &self,
        work: &Arc<Work>,
        first: usize,
        count: usize,
        rails: &[Arc<Rail>],
        way: impl Fn(u16, Lane) -> Option<Destination>,
    ) -> bool {
        let (mut invited, mut looked_at) = (0, 0);
        while invited < count && looked_at < self.all.len() {
            let index = (first + looked_at) % self.all.len();
            let lane = self.all[index];
            looked_at += 1;
            let Some(destination) = way(index as u16, lane) else { continue };
            invited += 1;
            let (work, lane_index) = (Arc::clone(work), index as u16);
            rails[lane.rail.index()].invite(Invitation {
                work,
                lane: lane_index,
                destination,
                shared: count > 1,
            });
        }
        self.invited.store((first as u64) << 32 | looked_at as u64, Ordering::Relaxed);
        invited > 0
    }

    /// The lanes that the last post took, with their places.
    fn invited(&self) -> impl Iterator<Item = (usize, Lane)> + '_ {
        let invited = self.invited.load(Ordering::Relaxed);
        let (first, count) = ((invited >> 32) as usize, (invited & u64::from(u32::MAX)) as usize);
        (first..first + count).map(|i| i % self.all.len()).map(|i| (i, self.all[i]))
    }
}

impl RegionUser for Transfer {
    fn forget_regions(&self) {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
