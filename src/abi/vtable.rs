//! Virtual tables in ELF files, slot by slot: what a NIXL library says about the order of its functions.

use object::read::elf::{ElfFile64, ElfSymbol64};
use object::{LittleEndian, Object as _, ObjectSection as _, ObjectSymbol as _, ObjectSymbolTable as _};
use object::{RelocationTarget, SectionIndex};

/// Bytes of a slot.
const SLOT: u64 = 8;
/// Words before the functions: the offset to the top and the type information.
const WORDS_BEFORE: u64 = 2;

/// One slot of a virtual table, as the file has it.
#[derive(Debug, PartialEq, Eq)]
pub enum Slot<'data> {
    /// No function: the destructors of a class that cannot be made, or a function without a symbol.
    Nameless,
    /// A pure virtual function.
    Pure,
    /// A function, with the mangled names it goes by: more than one where the compiler folded functions that do the same.
    Named(Vec<&'data str>),
}

/// A shared library as read from its file.
pub struct Library<'data>(ElfFile64<'data, LittleEndian>);

impl<'data> Library<'data> {
    /// The library in `data`; none where that is not an ELF file of this kind of machine.
    pub fn parse(data: &'data [u8]) -> Option<Self> {
        ElfFile64::parse(data).ok().map(Self)
    }

    /// The functions of the virtual table with the symbol `table` (`_ZTV…`); none where the library has no such table.
    ///
    /// The dynamic linker fills the slots, so it is asked what it would: its relocations give a function by symbol where the
    /// function is exported, else by address.
    pub fn slots(&self, table: &str) -> Option<Vec<Slot<'data>>> {
        let symbol = self.symbols().find(|symbol| symbol.is_definition() && symbol.name() == Ok(table))?;
        let first = symbol.address().checked_add(WORDS_BEFORE * SLOT)?;
        let end = symbol.address().checked_add(symbol.size())?;
        let mut slots: Vec<Slot> = self.stored_words(symbol.section_index()?, first, end)?;
        let symbols = self.0.dynamic_symbol_table()?;
        for (place, relocation) in self.0.dynamic_relocations()? {
            let Some(slot) = place.checked_sub(first).map(|offset| offset / SLOT) else { continue };
            let Some(slot) = slots.get_mut(usize::try_from(slot).ok()?) else { continue };
            *slot = match relocation.target() {
                RelocationTarget::Symbol(index) => named(symbols.symbol_by_index(index).ok()?.name().ok()?),
                _ => self.at(relocation.addend().cast_unsigned()),
            };
        }
        Some(slots)
    }

    /// Mangled names of what the library defines.
    pub fn defined(&self) -> impl Iterator<Item = &'data str> {
        self.symbols().filter(ElfSymbol64::is_definition).filter_map(|symbol| symbol.name().ok())
    }

    fn symbols(&self) -> impl Iterator<Item = ElfSymbol64<'data, '_, LittleEndian>> {
        self.0.symbols().chain(self.0.dynamic_symbols())
    }

    /// What the slots hold before the dynamic linker comes: an address where the relocation is a packed one (RELR).
    fn stored_words(&self, section: SectionIndex, first: u64, end: u64) -> Option<Vec<Slot<'data>>> {
        let section = self.0.section_by_index(section).ok()?;
        let words = section.data_range(first, end.checked_sub(first)?).ok()??.chunks_exact(SLOT as usize);
        Some(words.map(|word| self.at(u64::from_le_bytes(word.try_into().unwrap_or_default()))).collect())
    }

    fn at(&self, address: u64) -> Slot<'data> {
        if address == 0 {
            return Slot::Nameless;
        }
        let here = self.symbols().filter(|symbol| symbol.is_definition() && symbol.address() == address);
        let names: Vec<_> = here.filter_map(|symbol| symbol.name().ok()).collect();
        if names.is_empty() { Slot::Nameless } else { Slot::Named(names) }
    }
}

fn named(name: &str) -> Slot<'_> {
    if name == "__cxa_pure_virtual" { Slot::Pure } else { Slot::Named(vec![name]) }
}

/// The method that a mangled name stands for: the last component of a nested name; `~` for destructors, which have none.
pub fn method(mangled: &str) -> &str {
    let mut rest = mangled.strip_prefix("_ZN").unwrap_or(mangled);
    rest = rest.strip_prefix('K').unwrap_or(rest);
    let mut last = "";
    while let Some(after) = rest.find(|c: char| !c.is_ascii_digit()) {
        let Some((name, tail)) =
            rest[..after].parse().ok().and_then(|length: usize| rest[after..].split_at_checked(length))
        else {
            break;
        };
        (last, rest) = (name, tail);
    }
    if rest.starts_with(['D']) { "~" } else { last }
}
