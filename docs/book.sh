#!/bin/sh
# Builds the documents as a book: `sh docs/book.sh FOLDER` leaves it in FOLDER/html. MDBOOK names the program. mdBook takes
# one source folder and copies all of it, so the documents, and the sources that they link to, are copied to a folder of
# their own first.
set -eu

book=$1
rm -rf "$book"
mkdir -p "$book/source"
git rev-parse --git-dir >/dev/null 2>&1 || {
  echo "error: the book is made of the files that git knows, and this is no clone of the repository" >&2
  exit 1
}
git ls-files --cached --others --exclude-standard | while read -r file; do
  # A file that was removed, and not from the index yet, is not there.
  [ ! -e "$file" ] || echo "$file"
done | tar -cf - -T - | tar -xf - -C "$book/source"
cp docs/book.toml "$book/"
# The summary names its pages from its own folder; mdBook wants it in the source folder.
sed -e 's|](\([a-z]\)|](docs/\1|' -e 's|](\.\./|](|' docs/SUMMARY.md > "$book/source/SUMMARY.md"
rm "$book/source/docs/SUMMARY.md"
"$MDBOOK" build "$book"
