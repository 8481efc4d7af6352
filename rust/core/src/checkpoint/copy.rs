//! Copies stored bytes to memory that a device can read.

use std::sync::{Mutex, PoisonError};

use super::View;

/// Bytes that a thread copies at once: small enough that threads end together, large enough for reading ahead.
const PIECE: usize = 4 << 20;

/// Copies the bytes of each view, from its first element to its last, to the paired memory, with up to `threads`
/// threads. Pages are mapped before each piece is copied, and released afterwards.
///
/// # Panics
/// If the memory paired with a view differs in length from its bytes.
pub fn copy(views: Vec<(&View, &mut [u8])>, threads: usize) {
    let pieces: Vec<_> = views
        .into_iter()
        .flat_map(|(view, target)| {
            assert_eq!(target.len(), view.bytes().len(), "as many bytes as the view has");
            let pieces = view.pages().pieces(PIECE).zip(view.bytes().chunks(PIECE));
            pieces.zip(target.chunks_mut(PIECE))
        })
        .collect();
    let helpers = threads.min(pieces.len()).saturating_sub(1);
    let pieces = Mutex::new(pieces.into_iter());
    let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(((pages, source), target)) = next() {
            pages.populate();
            target.copy_from_slice(source);
            pages.give_back();
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            // If the system cannot start a thread, the others do its work.
            let _ = std::thread::Builder::new().name("safelora-fast-copy".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::checkpoint::{Layout, SafetensorsFile};

    #[test]
    fn every_byte_arrives_whatever_the_threads() {
        let (rows, cols) = (3000, 1001);
        let values: Vec<u8> = (0..rows * cols * 4).map(|index| (index % 251) as u8).collect();
        let header =
            format!(r#"{{"w":{{"dtype":"F32","shape":[{rows},{cols}],"data_offsets":[0,{}]}}}}"#, values.len());
        let path = std::env::temp_dir().join(format!("safelora-fast-copy-{}.safetensors", std::process::id()));
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(&path, [length.as_slice(), header.as_bytes(), &values].concat()).expect("a file");
        let file = Arc::new(SafetensorsFile::open(&path).expect("a checkpoint"));
        let view = |offset, rows| {
            let layout = Layout { offset, rows, cols, row_stride: cols, col_stride: 1 };
            View::new(Arc::clone(&file), "w", layout).expect("a view")
        };
        let (whole, part) = (view(0, rows), view(5 * cols, 2));
        for threads in [0, 1, 3, 64] {
            let (mut all, mut some) = (vec![0; values.len()], vec![0; 2 * cols * 4]);
            copy(vec![(&whole, &mut all), (&part, &mut some)], threads);
            assert_eq!(all, values);
            assert_eq!(some, values[5 * cols * 4..7 * cols * 4]);
        }
        std::fs::remove_file(path).expect("removed");
    }
}
