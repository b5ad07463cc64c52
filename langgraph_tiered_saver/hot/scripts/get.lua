-- Read the hot checkpoint of a namespace: whatever is hot, or only the one of an id.
-- KEYS: hot hash, shard, journal
-- ARGV: generation, checkpoint id ('' = the latest)
-- Returns {fields and values or false, journal length}, the length only when an id is given.
local generation = redis.call('HGET', KEYS[2], 'g')
if generation ~= ARGV[1] then
  return redis.error_reply('TIEREDGENERATION the generation here is ' .. (generation or 'unknown'))
end
if ARGV[2] == '' then return {redis.call('HGETALL', KEYS[1])} end
local fields = false
if redis.call('HGET', KEYS[1], 'id') == ARGV[2] then fields = redis.call('HGETALL', KEYS[1]) end
return {fields, redis.call('XLEN', KEYS[3])}
