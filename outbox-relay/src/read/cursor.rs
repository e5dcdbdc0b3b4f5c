//! The rows that come next: the outbox between two snapshots, by id, page by page.
//!
//! ```text
//!  published ──────────────┐ base            target ┌─ not read yet
//!                          │ rows of this window,   │
//!                          │ by id: …after_id│……    │
//! ```
//!
//! A window holds the rows that are visible in `target` and not in `base`. Two rows of one key are in order: their
//! writers held the key's lock to the commit. So the later one has the greater id, and no snapshot sees it without the
//! earlier. A row that commits late, with however low an id, is in the first window whose target sees it. No reader
//! waits for a writer. `target` is never made smaller to bound a window: rows of a transaction that got its id early
//! and the lock late would then overtake. A window is cut by id only.
//!
//! No step of reading touches more rows than a stretch has, whatever lies in the window or outside it. In a long
//! window, the cursor first searches the lowest and greatest id, piece by piece. Then it walks between them, stretch by
//! stretch.
//!
//! When the process dies, a new owner starts from the last position that was recorded in the batch log and
//! publishes again what was not.

use crate::{
    budget::{Area, Held, LEAST_BYTES, ROW_BYTES_MAX},
    position::{Position, ReadError},
    read::window::{self, Search},
    row::{Body, DELETED, Row},
    snapshot::{Snapshot, Span},
};
use sqlx::PgConnection;
use std::{collections::VecDeque, sync::Arc};
use tracing::warn;

/// How many rows are read at once, where there is room for them. Large enough that a round trip costs nothing per row,
/// small enough that the first row does not wait.
const PAGE_ROWS: usize = 5_000;
/// Bytes of rows that a page may carry. One row may exceed it alone.
const PAGE_BYTES: usize = 8 << 20;

/// Rows to publish, in order, and their place. There may be no rows: then a stretch of ids held nothing to publish.
pub(crate) struct Page {
    /// The topic whose rows these are, when it is catching up after a pause; else rows of any topic.
    pub(crate) only_topic: Option<Arc<str>>,
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

/// How the cursor finds the rows of the current window.
enum Plan {
    /// The window's length is not known yet: the cursor tries all of it at once.
    Untried,
    /// The whole window has been read.
    Read,
    /// The window has too many rows for one page: the cursor looks for the ids between which they lie.
    Search(Search),
    /// The cursor walks along the primary key from `floor` to `top`; rows of stragglers lie below and above as well.
    Walk { floor: i64, top: i64 },
}

/// Reads the outbox in publishing order.
pub(crate) struct Cursor {
    at: Position,
    plan: Plan,
    only_topic: Option<Arc<str>>,
    /// Rows that were read, but not handed out: large rows cut a page into several.
    read: VecDeque<Row>,
    /// The id up to which the window is read.
    reached: i64,
    area: Arc<Area>,
    /// The room for what is read next; after the read, the room that its rows take.
    room: Option<Held>,
    /// The room for what the rows of the next page lack.
    bodies: Option<Held>,
}

impl Cursor {
    pub(crate) fn new(at: Position, only_topic: Option<Arc<str>>, area: Arc<Area>) -> Self {
        let reached = at.after;
        Self { at, plan: Plan::Untried, only_topic, read: VecDeque::new(), reached, area, room: None, bodies: None }
    }

    /// Waits for room for what the next step reads. Do not call it within a conversation, whose time is bounded.
    pub(crate) async fn make_room(&mut self) {
        if self.read.is_empty() {
            self.room = Some(self.area.take((PAGE_ROWS + 1) * ROW_BYTES_MAX, LEAST_BYTES).await);
            return;
        }
        let (_, most) = self.next_rows(i64::MAX, usize::MAX);
        // Room that was made for these rows and not used yet is kept. To ask for as much while holding it would be to
        // wait for itself.
        if most > 0 && self.bodies.is_none() {
            let (_, least) = self.next_rows(i64::MAX, LEAST_BYTES);
            self.bodies = Some(self.area.take(most, least).await);
        }
    }

    /// How many rows there is room for, without one more that shows whether these are all.
    fn rows(&self) -> i64 {
        let rows = self.room.as_ref().map_or(0, Held::bytes) / ROW_BYTES_MAX;
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

    /// The next rows, or `None` when nothing new is committed. An empty page means that there is more to read: a
    /// stretch of a long window held no rows, or there is no room yet for large ones. [`Cursor::make_room`] comes
    /// first.
    pub(crate) async fn next(&mut self, db: &mut PgConnection) -> Result<Option<Page>, ReadError> {
        let page = self.find_next(db).await;
        self.give_back();
        page
    }

    /// Gives back room that nothing was read into.
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

    /// The next rows among those that the main stream, which stands at `main`, has passed; `None` when it has passed no
    /// more. An empty page is a stretch without such rows, which is recorded as well, or there is no room yet for large
    /// rows.
    pub(crate) async fn follow(&mut self, db: &mut PgConnection, main: &Position) -> Result<Option<Page>, ReadError> {
        let page = self.find_passed(db, main).await;
        self.give_back();
        page
    }

    async fn find_passed(&mut self, db: &mut PgConnection, main: &Position) -> Result<Option<Page>, ReadError> {
        if self.at.base == self.at.target && self.read.is_empty() {
            // The topic takes what the main stream has finished, at once; then the window that it is in.
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
            // Nothing lies between the two snapshots: the new one is as good a base, and a cheaper one to look from.
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

    /// Starts on a long window: looks for the ids between which it lies.
    async fn search(&mut self, db: &mut PgConnection) -> Result<(), ReadError> {
        self.plan = if self.at.base.is_initial() {
            // For the whole outbox, the present ids are the range.
            Plan::Walk { floor: 0, top: window::greatest_id(db).await? }
        } else {
            Plan::Search(Search::of(&self.span()))
        };
        Ok(())
    }

    fn span(&self) -> Span {
        Span::between(&self.at.base, &self.at.target)
    }

    /// Reads the next rows of the window, and closes an exhausted one. It may find no rows on its way.
    async fn fill(&mut self, db: &mut PgConnection) -> Result<(), ReadError> {
        match &mut self.plan {
            // How many of the window's rows were published before is not known, and they would be passed over one by
            // one.
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

    /// Tries a window that was not polled: of a topic that catches up, or begun by an owner before.
    async fn try_whole(&mut self, db: &mut PgConnection) -> Result<(), ReadError> {
        let span = self.span();
        let only_topic = self.only_topic.as_deref();
        if only_topic.is_some() && window::is_long(db, &span, self.rows()).await? {
            // The topic's rows may be few, and the query would look for them among all.
            return self.search(db).await;
        }
        let rows = window::whole(db, &span, only_topic, self.rows()).await?;
        self.take_whole(db, rows).await
    }

    /// Reads the next stretch of a long window.
    async fn walk(&mut self, db: &mut PgConnection, floor: i64, top: i64) -> Result<(), ReadError> {
        let (only_topic, most) = (self.only_topic.clone(), self.rows());
        let only_topic = only_topic.as_deref();
        let stragglers = self.span().stragglers;
        let rows = if self.reached < floor.saturating_sub(1) {
            let rows = window::stragglers(db, &stragglers, self.reached, floor, only_topic, most).await?;
            self.reached = rows.last().map_or(floor - 1, Row::id);
            rows
        } else if self.reached < top {
            let (rows, reached) = window::stretch(db, &self.at, self.reached, top, only_topic, most).await?;
            self.reached = reached;
            rows
        } else {
            let rows = window::stragglers(db, &stragglers, self.reached, i64::MAX, only_topic, most).await?;
            match rows.last() {
                Some(last) => self.reached = last.id(),
                None => self.close(),
            }
            rows
        };
        self.put(rows);
        Ok(())
    }

    /// Keeps the rows that were read, and no more room than they take.
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

    /// How many of the read rows up to `limit` fit into a page, and how many bytes they lack. The page has `room` bytes
    /// for what rows lack. The first row is always one of them. A row that is read alone is the last: while it waits
    /// for room, the rows before it leave theirs.
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

    /// Makes a page of these rows, behind which the cursor then stands.
    fn page(&mut self, rows: Vec<Row>, limit: i64) -> Page {
        let after = self.at.after;
        self.at.after = self.read.front().map_or(self.reached, |next| next.id() - 1).min(limit);
        let (base, target) = (self.at.base.clone(), self.at.target.clone());
        Page { only_topic: self.only_topic.clone(), base, target, after, rows, to: self.at.after, held: None }
    }
}

/// Reads what the rows of a page lack, without bodies that may be read only once the topic is known to take them. A row
/// that was deleted since its page was read is left out: without its body it would be sent as a tombstone.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Areas, Budget, least};
    use saga_core::testkit::TestDatabase;

    const MIB: i32 = 1 << 20;

    /// A cursor that has read rows 1, 2, … whose payloads have these sizes; a small one came with its page.
    async fn cursor(payloads: &[i32]) -> Cursor {
        let database = TestDatabase::new(&[]).await;
        let areas = Areas::new(&Budget::new(least(1), 1));
        let mut cursor = Cursor::new(Position::initial(), None, areas.main.clone());
        for (id, payload) in (1_i64..).zip(payloads) {
            let sizes = (*payload > 3_072).then_some([*payload, 0, 0, 0]);
            let read = sqlx::query(
                "select $1, gen_random_uuid(), 't'::text, null::text, ''::text,
                        case when $3::integer[] is null then convert_to(repeat('x', $2), 'UTF8') end, null::text, now(), $3",
            );
            let read = read.bind(id).bind(payload).bind(sizes.as_ref().map(<[i32; 4]>::as_slice));
            cursor.read.push_back(Row::new(read.fetch_one(&database.pool).await.unwrap()).unwrap());
        }
        cursor
    }

    #[tokio::test]
    async fn a_page_takes_rows_up_to_its_bytes_its_room_and_its_limit() {
        let small = cursor(&[10, 3_072, 20]).await;
        assert_eq!(small.next_rows(i64::MAX, 0), (3, 0), "small rows lack nothing");
        assert_eq!(small.next_rows(2, usize::MAX), (2, 0));

        let large = cursor(&[MIB; 9]).await;
        assert_eq!(large.next_rows(i64::MAX, usize::MAX), (8, 8 << 20), "a page carries 8 MiB");
        assert_eq!(large.next_rows(i64::MAX, 3 << 20), (3, 3 << 20));
        assert_eq!(large.next_rows(i64::MAX, 0), (1, 1 << 20), "the first row is always one of them");
    }

    #[tokio::test]
    async fn a_row_that_is_read_alone_ends_its_page_and_lacks_nothing_there() {
        let cursor = cursor(&[10, 2 * MIB, 20]).await;
        assert_eq!(cursor.next_rows(i64::MAX, usize::MAX), (2, 0));
    }

    #[tokio::test]
    async fn a_cursor_stands_behind_its_page_and_before_the_rows_that_it_has_read() {
        let mut cursor = cursor(&[10, 10, 10]).await;
        cursor.reached = 3;
        cursor.read.drain(..2);
        let page = cursor.page(Vec::new(), i64::MAX);
        assert_eq!((page.after, page.to, cursor.at.after), (0, 2, 2));
        cursor.read.clear();
        assert_eq!(cursor.page(Vec::new(), i64::MAX).to, 3);
        assert!(!cursor.knows_more());
    }
}
