//! Our directories in places that others use too: each is checked before it is used.
//!
//! Every user may make a directory, or a link, in `/tmp` and `/var/tmp`, also under a name that is about to be used. So
//! a directory that is there already has to be ours, and no other user may write to it. A link counts only if it is
//! ours or root's. Modes and owners are changed through a handle that follows no link. Directories above one that was
//! named are not checked: root often works in another user's checkout.

use crate::{Error, Result};
use nix::{
    fcntl::OFlag,
    unistd::{Uid, User},
};
use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::Path,
};

/// The mode bits by which the group and all others may write.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Makes a directory that others may read, whatever our umask is; one that is there already has to be ours.
pub fn make(path: &Path) -> Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|p| !p.exists()).collect();
    for directory in missing.into_iter().rev() {
        let doing = || format!("make the directory {}", directory.display());
        match fs::create_dir(directory) {
            Ok(()) => open_to_readers(directory)?,
            // Another process of ours may have made it meanwhile; so may another user, which the check below finds.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::io(doing())(e)),
        }
    }
    check(path, None)
}

/// Lets others read a directory that was just made here.
pub fn open_to_readers(path: &Path) -> Result<()> {
    let doing = || format!("let others read {}", path.display());
    let handle = handle(path).map_err(Error::io(doing()))?;
    handle.set_permissions(Permissions::from_mode(0o755)).map_err(Error::io(doing()))
}

/// Makes a directory that only `user` gets into, or only our own user. Its parent is one of ours.
pub fn make_closed(path: &Path, user: Option<&User>) -> Result<()> {
    let doing = || format!("make the directory {}", path.display());
    DirBuilder::new().mode(0o700).create(path).map_err(Error::io(doing()))?;
    let handle = handle(path).map_err(Error::io(doing()))?;
    handle.set_permissions(Permissions::from_mode(0o700)).map_err(Error::io(doing()))?;
    let Some(user) = user else { return Ok(()) };
    fchown(&handle, Some(user.uid.as_raw()), Some(user.gid.as_raw())).map_err(Error::io(doing()))
}

/// Whether a directory may be used: it is ours, root's or `user`'s, no other user writes to it, and no other user's
/// link leads there.
pub fn check(path: &Path, user: Option<&User>) -> Result<()> {
    let look = |at: std::io::Result<fs::Metadata>| at.map_err(Error::io(format!("look at {}", path.display())));
    let refuse = |why: String, cure: String| Err(Error::NotOurs { directory: path.to_owned(), why, cure });
    let removal = || format!("remove it (rm -r {})", path.display());
    let ours = |uid: u32| uid == 0 || uid == Uid::effective().as_raw();
    let link = look(fs::symlink_metadata(path))?;
    if link.is_symlink() && !ours(link.uid()) {
        let why = format!("it is a link, which belongs to {}", name_of(link.uid()));
        return refuse(why, format!("remove it (rm {})", path.display()));
    }
    let there = look(fs::metadata(path))?;
    if !there.is_dir() {
        return refuse("it is no directory".into(), removal());
    }
    if !ours(there.uid()) && user.is_none_or(|user| user.uid.as_raw() != there.uid()) {
        let user = user.map_or_else(String::new, |user| format!(" or {}", user.name));
        let us = name_of(Uid::effective().as_raw());
        return refuse(format!("it belongs to {}, not to {us}{user}", name_of(there.uid())), removal());
    }
    if there.mode() & WRITABLE_BY_OTHERS != 0 {
        let why = format!("others may write to it (its mode is {:04o})", there.mode() & 0o7777);
        return refuse(why, format!("look what is in it, then close it (chmod go-w {})", path.display()));
    }
    Ok(())
}

/// Opens the directory itself: `ELOOP` or `ENOTDIR` for a link.
fn handle(path: &Path) -> std::io::Result<File> {
    File::options().read(true).custom_flags((OFlag::O_NOFOLLOW | OFlag::O_DIRECTORY).bits()).open(path)
}

/// The user's name and number, as in `postgres (uid 26)`; the number alone without a name.
pub(crate) fn name_of(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| format!("uid {uid}"), |user| format!("{} (uid {uid})", user.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write,
        os::unix::fs::{chown, lchown, symlink},
    };

    /// A uid that no user has.
    const ANOTHER: u32 = 12_345;

    fn refused(path: &Path) -> String {
        let made = make(path).unwrap_err().to_string();
        assert_eq!(check(path, None).unwrap_err().to_string(), made);
        assert!(made.contains(&path.display().to_string()) && made.contains("STACK_CACHE"), "{made}");
        made
    }

    fn is_root() -> bool {
        let root = Uid::effective().is_root();
        if !root {
            // The line does not go through `eprintln`, which shows a test's output only when the test fails.
            std::io::stderr()
                .write_all(b"NOT TESTED with what belongs to another user: only root can make that\n")
                .unwrap();
        }
        root
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused_and_left_alone() {
        let place = tempfile::tempdir().unwrap();
        for mode in [0o777, 0o1777, 0o775, 0o757] {
            fs::set_permissions(place.path(), Permissions::from_mode(mode)).unwrap();
            let said = refused(place.path());
            assert!(said.contains(&format!("{mode:04o}")) && said.contains("chmod go-w"), "{said}");
            assert_eq!(fs::metadata(place.path()).unwrap().mode() & 0o7777, mode);
        }
        fs::set_permissions(place.path(), Permissions::from_mode(0o700)).unwrap();
        make(place.path()).unwrap();
        assert_eq!(fs::metadata(place.path()).unwrap().mode() & 0o7777, 0o700);
    }

    #[test]
    fn a_new_directory_is_ours_and_open_to_readers_or_closed() {
        let place = tempfile::tempdir().unwrap();
        let (open, closed) = (place.path().join("a/b"), place.path().join("a/closed"));
        make(&open).unwrap();
        make_closed(&closed, None).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!([mode(open.parent().unwrap()), mode(&open), mode(&closed)], [0o755, 0o755, 0o700]);
        assert!(make_closed(&closed, None).is_err(), "it is there already");
    }

    #[test]
    fn a_file_and_a_link_to_nothing_are_refused() {
        let place = tempfile::tempdir().unwrap();
        let (file, link) = (place.path().join("file"), place.path().join("link"));
        fs::write(&file, "").unwrap();
        symlink(place.path().join("nothing"), &link).unwrap();
        assert!(refused(&file).contains("no directory"));
        assert!(make(&link).is_err() && !place.path().join("nothing").exists());
    }

    #[test]
    fn a_directory_of_another_user_is_refused_unless_it_is_the_servers() {
        if !is_root() {
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let theirs = place.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        let nobody = User::from_name("nobody").unwrap().unwrap();
        chown(&theirs, Some(nobody.uid.as_raw()), None).unwrap();
        let said = refused(&theirs);
        assert!(said.contains("belongs to nobody (uid") && said.contains("not to root"), "{said}");
        check(&theirs, Some(&nobody)).unwrap();
        chown(&theirs, Some(ANOTHER), None).unwrap();
        assert!(check(&theirs, Some(&nobody)).is_err());
    }

    #[test]
    fn a_link_of_another_user_is_refused_and_nothing_happens_where_it_leads() {
        let place = tempfile::tempdir().unwrap();
        let (ours, link) = (place.path().join("ours"), place.path().join("link"));
        DirBuilder::new().mode(0o700).create(&ours).unwrap();
        symlink(&ours, &link).unwrap();
        make(&link).unwrap();
        // Not even a link of our own is a way to change the directory that it leads to.
        assert!(open_to_readers(&link).is_err() && make_closed(&link, None).is_err());
        if is_root() {
            lchown(&link, Some(ANOTHER), None).unwrap();
            assert!(refused(&link).contains(&format!("a link, which belongs to uid {ANOTHER}")));
        }
        assert_eq!(fs::metadata(&ours).unwrap().mode() & 0o7777, 0o700);
    }
}
