-- List the threads of a shard that have unflushed records.
-- KEYS: dirty, shard
-- ARGV: generation ('' = any), as for a journal: what is not here is taken for flushed
-- Returns the threads.
if ARGV[1] ~= '' then
  local generation = redis.call('HGET', KEYS[2], 'g')
  if generation ~= ARGV[1] then
    return redis.error_reply('TIEREDGENERATION the generation here is ' .. (generation or 'unknown'))
  end
end
return redis.call('ZRANGE', KEYS[1], 0, -1)
