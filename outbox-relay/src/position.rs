//! Which rows come next: the outbox between two snapshots, by id, page by page.
//!
//! ```text
//!  published ──────────────┐ base            target ┌─ not looked at yet
//!                          │ rows of this window,   │
//!                          │ by id: …after_id│……    │
//! ```
//!
//! A window holds the rows that are visible in `target` and not in `base`. Two rows of one key are in order: their
//! writers held the key's lock to the commit, so the later one has the greater id, and no snapshot sees it without the
//! earlier. A row that commits late, with however low an id, is in the first window whose target sees it. Nothing waits
//! for anybody. `target` is never made smaller to bound a window (rows of a transaction that got its id early and the
//! lock late would then overtake): a window is cut by id only.
//!
//! No step of reading touches more rows than a stretch has, whatever lies in the window or outside it: a long window is
//! first searched for its lowest and greatest id, piece by piece, then walked between them, stretch by stretch.
//!
//! When the process dies, a new owner starts from the last position that was recorded in the batch log and
//! publishes again what was not.

use crate::{
    budget::{Area, Held, LEAST, ROW},
    row::{Body, DELETED, Row},
    snapshot::{Snapshot, Span},
    window::{self, Search},
};
use sqlx::PgConnection;
use std::{collections::VecDeque, sync::Arc};
use tracing::warn;

/// Rows that are read at once, where there is room for them. Large enough that a round trip costs nothing per row,
/// small enough that the first one is not kept waiting.
const PAGE_ROWS: usize = 5_000;
/// Bytes of rows that a page may carry. One row may exceed it alone.
const PAGE_BYTES: usize = 8 << 20;

/// Where reading stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// Everything visible in it is published.
    pub base: Snapshot,
    /// What is being published: the rows visible in it and not in `base` …
    pub target: Snapshot,
    /// … whose id is greater than this.
    pub after: i64,
}

impl Position {
    /// Before the first row.
    pub fn initial() -> Self {
        Self { base: Snapshot::initial(), target: Snapshot::initial(), after: 0 }
    }

    /// All that `snapshot` sees is published.
    pub fn at(snapshot: Snapshot) -> Self {
        Self { base: snapshot.clone(), target: snapshot, after: 0 }
    }

    /// Whether all that is published at `other`, an earlier or later position of the same stream, is published here.
    pub(crate) fn includes(&self, other: &Self) -> bool {
        let same = self.base == other.base && self.target == other.target;
        same && self.after >= other.after || self.base.includes(&other.target)
    }

    /// Up to which id the rows of a window are published here that ends with `target`.
    fn limit(&self, target: &Snapshot) -> Option<i64> {
        if self.base.includes(target) {
            return Some(i64::MAX);
        }
        self.target.includes(target).then_some(self.after)
    }
}

/// Rows to publish, in order, and where they stand. There may be none: then a stretch of ids held nothing to publish.
pub(crate) struct Page {
    /// The topic whose rows these are, when it is catching up after a pause; else rows of any topic.
    pub(crate) lane: Option<Arc<str>>,
    pub(crate) base: Snapshot,
    pub(crate) target: Snapshot,
    /// The position before the first row.
    pub(crate) after: i64,
    pub(crate) rows: Vec<Row>,
    /// The position behind the page; no row of the window is left up to this id.
    pub(crate) to: i64,
    /// The room that its rows take.
    pub(crate) held: Option<Held>,
}

/// How the rows of the current window are found.
enum Plan {
    /// Not known yet: try all of it at once.
    Untried,
    /// All of it has been read.
    Read,
    /// Too many for one page: look for the ids between which they lie.
    Search(Search),
    /// Along the primary key from `floor` to `top`; rows of stragglers lie below and above as well.
    Walk { floor: i64, top: i64 },
}

/// Reads the outbox in publishing order.
pub(crate) struct Cursor {
    at: Position,
    plan: Plan,
    lane: Option<Arc<str>>,
    /// Read, but not handed out: large rows cut a page into several.
    read: VecDeque<Row>,
    /// The window is read up to this id.
    reached: i64,
    area: Arc<Area>,
    /// The room for what is read next; once it is read, what its rows take.
    room: Option<Held>,
    /// The room for what the rows of the next page lack.
    bodies: Option<Held>,
}

impl Cursor {
    pub(crate) fn new(at: Position, lane: Option<Arc<str>>, area: Arc<Area>) -> Self {
        let reached = at.after;
        Self { at, plan: Plan::Untried, lane, read: VecDeque::new(), reached, area, room: None, bodies: None }
    }

    /// Waits for room for what the next step reads. Not within a conversation, whose time is bounded.
    pub(crate) async fn make_room(&mut self) {
        if self.read.is_empty() {
            self.room = Some(self.area.take((PAGE_ROWS + 1) * ROW, LEAST).await);
            return;
        }
        let (_, most) = self.next_rows(i64::MAX, usize::MAX);
        // What was made for these rows and not used yet is kept: to hold it while as much is asked for is to wait for
        // oneself.
        if most > 0 && self.bodies.is_none() {
            let (_, least) = self.next_rows(i64::MAX, LEAST);
            self.bodies = Some(self.area.take(most, least).await);
        }
    }

    /// How many rows there is room for, beside one more that tells whether these are all.
    fn rows(&self) -> i64 {
        let rows = self.room.as_ref().map_or(0, Held::bytes) / ROW;
        i64::try_from(rows).unwrap_or(i64::MAX).saturating_sub(1)
    }

    /// Whether the next rows are known to be there: the window was cut, or is long.
    pub(crate) fn knows_more(&self) -> bool {
        !self.read.is_empty() || matches!(self.plan, Plan::Search(_) | Plan::Walk { .. })
    }

    /// Whether all that is published at `main` was handed out.
    pub(crate) fn has_reached(&self, main: &Position) -> bool {
        self.at.includes(main)
    }

    /// The next rows, or `None` when nothing new is committed. An empty page means that a stretch of a long window held
    /// none, or that there is no room yet for large rows, and that there is more to be read. Room was made for what
    /// this reads.
    pub(crate) async fn next(&mut self, db: &mut PgConnection) -> Result<Option<Page>, ReadError> {
        let page = self.find_next(db).await;
        self.give_back();
        page
    }

    /// The room that nothing was read into.
    fn give_back(&mut self) {
        if self.read.is_empty() {
            self.room = None;
        }
    }

    async fn find_next(&mut self, db: &mut PgConnection) -> Result<Option<Page>, ReadError> {
        let mut polled = false;
        loop {
            if !self.read.is_empty() {
                return self.cut(db, i64::MAX).await.map(Some);
            }
            if self.at.base == self.at.target {
                if std::mem::replace(&mut polled, true) || !self.poll(db).await? {
                    return Ok(None);
                }
            } else {
                self.fill(db).await?;
                if self.read.is_empty() && self.knows_more() {
                    return Ok(Some(self.page(Vec::new(), i64::MAX)));
                }
            }
        }
    }

    /// The next rows of those that the main stream has passed, which stands at `main`; `None` when it has passed no
    /// more. An empty page is a stretch without such rows, which is recorded as well, or there is no room yet for large
    /// rows.
    pub(crate) async fn follow(&mut self, db: &mut PgConnection, main: &Position) -> Result<Option<Page>, ReadError> {
        let page = self.find_passed(db, main).await;
        self.give_back();
        page
    }

    async fn find_passed(&mut self, db: &mut PgConnection, main: &Position) -> Result<Option<Page>, ReadError> {
        if self.at.base == self.at.target && self.read.is_empty() {
            // As much as the main stream has finished at once; then the window that it is in.
            let target = if main.base.includes(&self.at.base) && main.base != self.at.base {
                &main.base
            } else if main.base == self.at.base && main.target != main.base {
                &main.target
            } else {
                return Ok(None);
            };
            self.begin(target.clone());
        }
        let Some(limit) = main.limit(&self.at.target) else { return Ok(None) };
        if self.read.is_empty() {
            if self.at.after >= limit {
                return Ok(None);
            }
            self.fill(db).await?;
        }
        if self.read.front().is_some_and(|next| next.id() > limit) && self.at.after >= limit {
            return Ok(None);
        }
        self.cut(db, limit).await.map(Some)
    }

    /// Takes a snapshot that ends the next window; false when there is nothing new.
    async fn poll(&mut self, db: &mut PgConnection) -> Result<bool, ReadError> {
        let (target, rows) = window::poll(db, &self.at.base, self.rows()).await?;
        if rows.is_empty() {
            // Nothing between the two: the new snapshot is as good a base, and a cheaper one to look from.
            self.at = Position::at(target);
            return Ok(false);
        }
        self.begin(target);
        self.take_whole(db, rows).await?;
        Ok(true)
    }

    fn begin(&mut self, target: Snapshot) {
        self.plan = Plan::Untried;
        (self.at.target, self.at.after, self.reached) = (target, 0, 0);
    }

    /// Takes the rows of a window that was tried as a whole: all of them, or one more than a page may hold.
    async fn take_whole(&mut self, db: &mut PgConnection, rows: Vec<Row>) -> Result<(), ReadError> {
        if i64::try_from(rows.len()).is_ok_and(|found| found > self.rows()) {
            return self.search(db).await;
        }
        self.plan = Plan::Read;
        self.put(rows);
        self.read.make_contiguous().sort_unstable_by_key(Row::id);
        self.reached = self.read.back().map_or(self.reached, Row::id);
        Ok(())
    }

    /// A long window: looks for the ids between which it lies.
    async fn search(&mut self, db: &mut PgConnection) -> Result<(), ReadError> {
        self.plan = if self.at.base.is_initial() {
            // The whole outbox: what is there now holds it.
            Plan::Walk { floor: 0, top: window::greatest_id(db).await? }
        } else {
            Plan::Search(Search::of(&self.span()))
        };
        Ok(())
    }

    fn span(&self) -> Span {
        Span::between(&self.at.base, &self.at.target)
    }

    /// Reads the next rows of the window; an exhausted one is closed. It may find none on its way.
    async fn fill(&mut self, db: &mut PgConnection) -> Result<(), ReadError> {
        match &mut self.plan {
            // How many of its rows were published before is not known, and they would be passed over one by one.
            Plan::Untried if self.at.after > 0 => return self.search(db).await,
            Plan::Untried => return self.try_whole(db).await,
            Plan::Read => self.close(),
            Plan::Search(search) => {
                if let Some((floor, top)) = search.step(db).await? {
                    self.plan = Plan::Walk { floor, top };
                }
            }
            &mut Plan::Walk { floor, top } => self.walk(db, floor, top).await?,
        }
        Ok(())
    }

    /// A window that was not polled: of a topic that catches up, or begun by an owner before.
    async fn try_whole(&mut self, db: &mut PgConnection) -> Result<(), ReadError> {
        let span = self.span();
        let lane = self.lane.as_deref();
        if lane.is_some() && window::is_long(db, &span, self.rows()).await? {
            // Its rows of this topic may be few, and would be looked for among all.
            return self.search(db).await;
        }
        let rows = window::whole(db, &span, lane, self.rows()).await?;
        self.take_whole(db, rows).await
    }

    /// The next stretch of a long window.
    async fn walk(&mut self, db: &mut PgConnection, floor: i64, top: i64) -> Result<(), ReadError> {
        let (lane, most) = (self.lane.clone(), self.rows());
        let lane = lane.as_deref();
        let stragglers = self.span().stragglers;
        let rows = if self.reached < floor.saturating_sub(1) {
            let ids = (self.reached, floor);
            let rows = window::stragglers(db, &stragglers, ids, lane, most).await?;
            self.reached = rows.last().map_or(floor - 1, Row::id);
            rows
        } else if self.reached < top {
            let (rows, reached) = window::stretch(db, &self.at, (self.reached, top), lane, most).await?;
            self.reached = reached;
            rows
        } else {
            let rows = window::stragglers(db, &stragglers, (self.reached, i64::MAX), lane, most).await?;
            match rows.last() {
                Some(last) => self.reached = last.id(),
                None => self.close(),
            }
            rows
        };
        self.put(rows);
        Ok(())
    }

    /// Keeps what was read, and no more room than it takes.
    fn put(&mut self, rows: Vec<Row>) {
        self.read.extend(rows);
        if let Some(room) = self.room.as_mut().filter(|_| !self.read.is_empty()) {
            room.keep(self.read.iter().map(Row::cost_as_read).sum());
        }
    }

    fn close(&mut self) {
        self.at = Position::at(self.at.target.clone());
        self.plan = Plan::Untried;
        self.reached = 0;
    }

    /// How many of the read rows up to `limit` a page may hold that has room for so many bytes which they lack, and how
    /// many these are. The first row is always one of them. A row that is read alone is the last: while it waits for
    /// room, the rows before it leave theirs.
    fn next_rows(&self, limit: i64, room: usize) -> (usize, usize) {
        let (mut rows, mut bytes, mut lacking) = (0, 0_usize, 0);
        for row in self.read.iter().take_while(|row| row.id() <= limit) {
            bytes = bytes.saturating_add(row.bytes());
            if rows > 0 && (bytes > PAGE_BYTES || lacking + row.lacking() > room) {
                break;
            }
            rows += 1;
            lacking += row.lacking();
            if row.is_read_alone() {
                break;
            }
        }
        (rows, lacking)
    }

    /// Hands out as many of the read rows up to `limit` as a page may hold, with the large bodies that it may carry;
    /// none when there is no room for these.
    async fn cut(&mut self, db: &mut PgConnection, limit: i64) -> Result<Page, ReadError> {
        let (_, most) = self.next_rows(limit, usize::MAX);
        let bodies = self.bodies.take().or_else(|| self.area.try_take(most));
        let Some(mut bodies) = bodies else { return Ok(self.page(Vec::new(), limit)) };
        let (take, lacking) = self.next_rows(limit, bodies.bytes());
        bodies.keep(lacking);
        let mut rows: Vec<Row> = self.read.drain(..take).collect();
        if let Some(room) = &mut self.room {
            bodies.join(room.split(rows.iter().map(Row::cost_as_read).sum()));
        }
        read_large(db, &mut rows).await?;
        let page = self.page(rows, limit);
        Ok(Page { held: Some(bodies), ..page })
    }

    /// A page of these rows, behind which the cursor then stands.
    fn page(&mut self, rows: Vec<Row>, limit: i64) -> Page {
        let after = self.at.after;
        self.at.after = self.read.front().map_or(self.reached, |next| next.id() - 1).min(limit);
        let (base, target) = (self.at.base.clone(), self.at.target.clone());
        Page { lane: self.lane.clone(), base, target, after, rows, to: self.at.after, held: None }
    }
}

/// Reads what the rows of a page lack, but for bodies that are too large to be read before the topic is known to take
/// them. A row that was deleted since its page was read is left out: without its body it would be sent as a tombstone.
async fn read_large(db: &mut PgConnection, rows: &mut Vec<Row>) -> Result<(), ReadError> {
    let (unread, lacking): (Vec<&Row>, Vec<&Row>) =
        rows.iter().filter(|row| row.lacks_body()).partition(|row| row.is_read_alone());
    let keys: Vec<i64> = unread.iter().filter(|row| row.lacks_key()).map(|row| row.id()).collect();
    let bodies: Vec<i64> = lacking.iter().map(|row| row.id()).collect();
    if !bodies.is_empty() {
        for body in Body::read(db, &bodies).await? {
            if let Ok(at) = rows.binary_search_by_key(&body.id, Row::id) {
                rows[at].set_body(body);
            }
        }
    }
    if !keys.is_empty() {
        for (id, key) in window::keys(db, &keys).await? {
            if let Ok(at) = rows.binary_search_by_key(&id, Row::id) {
                rows[at].set_key(key);
            }
        }
    }
    let deleted = |row: &Row| row.lacks_key() || row.lacks_body() && !row.is_read_alone();
    rows.retain(|row| {
        let keep = !deleted(row);
        if !keep {
            warn!(id = row.id(), "{DELETED}");
        }
        keep
    });
    Ok(())
}

impl ReadError {
    /// What the database said, if it is about the database.
    pub(crate) fn database(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Database(error) => Some(error),
            Self::Snapshot(_) => None,
        }
    }
}

/// Reading the outbox failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// PostgreSQL said so, or is not there.
    #[error("reading the outbox: {0}")]
    Database(#[from] sqlx::Error),
    /// A snapshot in the batch log, or from the server, does not parse.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::NotASnapshot),
}
